"""What models of features share: declared streams, embedded and fused frame by frame, and postures beside the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.errors import InputError
from trainer.layout import TimeLayout
from trainer.models.inception import average
from trainer.models.recognizer import Recognizer


class FeatureRecognizer(Recognizer):
    """A model of features: an embedding, a network in time, and the mean posture of each output frame beside it."""

    def __init__(
        self, *, feature_dim: int, channels: int, total_stride: int, streams: Mapping[str, Sequence[int]] | None
    ) -> None:
        """Embed D features in `channels`; the network in time and the head are made after it, by whoever inherits."""
        super().__init__()
        self.total_stride, self.frame_shape = total_stride, (feature_dim,)
        self.embed = StreamFusion(check_streams(streams, feature_dim), channels)

    @abstractmethod
    def in_time(self, x: Tensor, layout: TimeLayout) -> Tensor:
        """Map embedded frames `[L, channels]`, silent in the guards, to `[L / stride, C]`."""

    def visual(self, frames: Tensor, layout: TimeLayout) -> Tensor:
        """Return visual features `[L / stride, C + channels]`; `frames` `[N, D]`, clip after clip."""
        embedded = self.embed(frames)
        x = embedded.new_zeros(layout.length, embedded.shape[1]).index_copy(0, layout.frame_positions, embedded)
        # Postures reach the BiLSTM directly too: it learns from them while the network in time finds its way.
        postures = mean_frames(x, layout, self.total_stride)
        return torch.cat([self.in_time(x, layout), postures], dim=1)


def mean_frames(x: Tensor, layout: TimeLayout, stride: int) -> Tensor:
    """Average the frames of each output frame, `[L, C]` to `[L / stride, C]`; silence does not count."""
    return average(x, layout.masks[1], stride)


class StreamFusion(nn.Module):
    """Embed each feature stream and fuse them by gates that every frame computes from all streams."""

    def __init__(self, streams: Mapping[str, Sequence[tuple[int, int]]], embedding: int) -> None:
        super().__init__()
        self.slices = [list(spans) for spans in streams.values()]
        widths = [sum(stop - start for start, stop in spans) for spans in self.slices]
        self.project = nn.ModuleDict(
            {name: nn.Linear(width, embedding) for name, width in zip(streams, widths, strict=True)}
        )
        self.norm = nn.ModuleDict({name: nn.LayerNorm(embedding) for name in streams})
        self.gate = nn.Linear(embedding * len(streams), len(streams)) if len(streams) > 1 else None

    def forward(self, features: Tensor) -> Tensor:
        """Map `[N, D]` to `[N, embedding]`, non-negative."""
        embedded = []
        for name, spans in zip(self.project, self.slices, strict=True):
            parts = [features[:, start:stop] for start, stop in spans]
            stream = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            embedded.append(F.relu(self.norm[name](self.project[name](stream))))
        if self.gate is None:
            return embedded[0]
        gates = self.gate(torch.cat(embedded, dim=1)).softmax(dim=1)
        return sum((gates[:, i : i + 1] * stream for i, stream in enumerate(embedded)), torch.zeros_like(embedded[0]))


def check_streams(streams: Mapping[str, Sequence[int]] | None, feature_dim: int) -> dict[str, list[tuple[int, int]]]:
    """Turn declared streams into slices; refuse what lies outside D, overlaps, or is no module name.

    Dimensions that no stream names are refused too: a slice forgotten is the likelier reading.
    """
    if not streams:
        return {"all": [(0, feature_dim)]}
    spans = {name: list(zip(edges[::2], edges[1::2], strict=True)) for name, edges in streams.items()}
    problems = [
        f"streams: {name} takes [{start}, {stop}) but the corpus has D = {feature_dim}; correct the slice"
        for name, parts in spans.items()
        for start, stop in parts
        if stop > feature_dim
    ]
    problems += [
        f"streams: {name!r} is no plain name, or one that torch keeps for itself; use letters, digits and _"
        for name in spans
        if not name.isidentifier() or hasattr(nn.ModuleDict(), name)
    ]
    ordered = sorted((start, stop, name) for name, parts in spans.items() for start, stop in parts)
    reached, last = 0, ""
    for start, stop, name in ordered:
        if start < reached:
            problems.append(
                f"streams: {name} [{start}, {stop}) overlaps {last}, which reaches {reached}; correct the slices"
            )
        if start > reached:
            problems.append(f"streams: no stream takes dimensions [{reached}, {start}); declare one for them")
        reached, last = max(reached, stop), name
    if reached < feature_dim:
        problems.append(f"streams: no stream takes dimensions [{reached}, {feature_dim}); declare one for them")
    if problems:
        raise InputError(problems)
    return spans
