"""A trained model over one clip, in operations that torch.export and ONNX know with a time axis of any length.

What goes in is what the trainer reads: raw features `[T, D]`, or cropped frames, uint8 `[T, crop, crop, 3]`.

Training lays clips end to end and packs them for the BiLSTM; one clip needs neither. The model's own forward pass is
used as it is, on a layout whose sizes follow from the clip's length inside the graph. Only the head differs: both
exporters would unroll torch's LSTM to the length of the example, so that its walk is written as a scan here.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from trainer.data.normalization import Normalization
from trainer.errors import InputError
from trainer.layout import TimeLayout, lay_out, slot_frames
from trainer.models.recognizer import Recognizer
from trainer.models.temporal_head import Outputs, TemporalHead
from trainer.objectives.ctc import float32_log_probs


class Normalize(nn.Module):
    """Raw features of one clip `[T, D]` to the model's input, as `trainer.data.transform` computes it."""

    mean: Tensor
    scale: Tensor

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        self.kind = normalization.kind
        self.register_buffer("mean", torch.from_numpy(normalization.mean))
        self.register_buffer("scale", torch.from_numpy(normalization.scale))

    def forward(self, features: Tensor) -> Tensor:
        """Map `[T, D]` to `[T, D]`, float32."""
        if self.kind in ("none", "frames"):
            # A model of video normalises its frames itself.
            return features
        if self.kind == "corpus":
            return (features - self.mean) * self.scale
        exact = features.double()
        mean = exact.mean(dim=0)
        spread = (exact - mean).square().mean(dim=0).sqrt()
        # As trainer.data.normalization has it: what varies by rounding alone is constant.
        constant = spread <= 1e-6 * mean.abs().clamp(min=1.0)
        one = torch.ones_like(spread)
        inverse = torch.where(constant, one, 1.0 / torch.where(constant, one, spread))
        return (features - mean.float()) * inverse.float()


class ClipModel(nn.Module):
    """One clip, `[T, D]` or frames, to log-probabilities `[ceil(T / total_stride), V]`, float32."""

    def __init__(self, model: Recognizer, normalization: Normalization) -> None:
        """Copy a model for export; raises `InputError` for one whose parts are not known here."""
        super().__init__()
        head = getattr(model, "head", None)
        if not isinstance(head, TemporalHead):
            raise InputError(
                f"{type(model).__name__}: only models whose head is a BiLSTM can be exported to this format; evaluate "
                "and use the run itself"
            )
        self.normalize = Normalize(normalization)
        self.model = copy.deepcopy(model).eval()
        self.model.add_module("head", ClipHead(copy.deepcopy(head)))
        self.total_stride = model.total_stride

    def forward(self, clip: Tensor) -> Tensor:
        """Return log-probabilities of the blank (class 0) and the glosses."""
        layout = _lay_out_one(clip.shape[0], self.total_stride, clip.device)
        return float32_log_probs(self.model(self.normalize(clip), layout))


class ClipHead(nn.Module):
    """The trained head over one clip."""

    def __init__(self, head: TemporalHead) -> None:
        super().__init__()
        self.rnn, self.classifier = head.rnn, head.classifier

    def forward(self, x: Tensor, layout: TimeLayout) -> Outputs:
        """Map `[L / stride, inputs]` to logits `[M, V]`."""
        x = x.index_select(0, layout.rnn_positions)
        for lstm in self.rnn:
            assert isinstance(lstm, nn.LSTM)
            x = torch.cat([_walk(lstm, x, ""), _walk(lstm, x, "_reverse")], dim=1)
        return Outputs(self.classifier(x))


def _walk(lstm: nn.LSTM, x: Tensor, direction: str) -> Tensor:
    """Run one direction of an LSTM layer over `[M, C]`."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(lstm, f"{name}_l0{direction}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )

    def step(state: tuple[Tensor, Tensor], frame: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        hidden, cell = state
        enter, keep, new, leave = (frame + F.linear(hidden, w_hh)).chunk(4)
        cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        # What is carried on and what is put out may not share memory.
        return (hidden, cell), hidden.clone()

    start = x.new_zeros(w_hh.shape[1])
    gates = F.linear(x, w_ih, b_ih + b_hh)
    outputs: Tensor = scan(step, (start, start.clone()), gates, dim=0, reverse=bool(direction))[1]
    return outputs


def _lay_out_one(num_frames: int, total_stride: int, device: torch.device) -> TimeLayout:
    """Lay one clip out as `lay_out` does, by sizes that stay symbols in an exported graph."""
    outputs = (num_frames + total_stride - 1) // total_stride
    guard = int(slot_frames(np.array([0]), total_stride)[0])
    length = outputs * total_stride + guard

    def mask(stride: int) -> Tensor:
        frames = (num_frames + stride - 1) // stride
        silent = length // stride - frames
        return torch.cat([torch.ones(frames, 1, device=device), torch.zeros(silent, 1, device=device)])

    # From one of a fixed length, so that what the layout holds beside these stays what `lay_out` makes it.
    fixed = lay_out(np.array([1]), total_stride)
    return dataclasses.replace(
        fixed,
        input_lengths=(num_frames,),
        output_lengths=(outputs,),
        length=length,
        frame_positions=torch.arange(num_frames),
        masks={stride: mask(stride) for stride in fixed.masks},
        rnn_positions=torch.arange(outputs),
        rnn_batch_sizes=torch.ones(1, dtype=torch.int64),
        dense_order=torch.arange(outputs),
    )
