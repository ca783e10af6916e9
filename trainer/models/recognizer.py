"""What every model is to the rest of the house: frames and their layout in, logits per output frame out.

A model makes visual features of the frames, one vector per output frame; the head that all models share reads them in
context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from trainer.layout import TimeLayout
from trainer.models.temporal_head import Outputs, TemporalHead


class Recognizer(nn.Module, ABC):
    """A model of clips laid end to end; a clip's logits depend on that clip alone."""

    total_stride: int
    """Input frames per output frame."""
    frame_shape: tuple[int, ...]
    """Shape of one input frame: (D,) for features, (-1, -1, 3) for video of any size."""
    frame_dtype: torch.dtype = torch.float32
    """Type of the input: float32 for features, uint8 for video."""
    head: TemporalHead

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the parts that hold the weights, in the order of the forward pass: what is sharded one by one.

        None lies inside another, and the forward pass calls each of them exactly once.
        """

    @abstractmethod
    def visual(self, frames: Tensor, layout: TimeLayout) -> Tensor:
        """Return visual features `[L / total_stride, C]` of clips laid out by `layout`; `frames` as `forward` does."""

    def outputs(self, frames: Tensor, layout: TimeLayout) -> Outputs:
        """Return all that the model makes of clips, in a training run more than their logits."""
        found: Outputs = self.head(self.visual(frames, layout), layout)
        return found

    def forward(self, frames: Tensor, layout: TimeLayout) -> Tensor:
        """Return logits `[M, V]` of clips laid out by `layout`; `frames` `[N, *frame_shape]`, clip after clip."""
        return self.outputs(frames, layout).logits
