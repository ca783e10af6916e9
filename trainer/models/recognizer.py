"""What every model is to the rest of the house: frames and their layout in, logits per output frame out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from trainer.layout import TimeLayout


class Recognizer(nn.Module, ABC):
    """A model of clips laid end to end; a clip's logits depend on that clip alone."""

    total_stride: int
    """Input frames per output frame."""
    frame_shape: tuple[int, ...]
    """Shape of one input frame: (D,) for features, (-1, -1, 3) for video of any size."""
    frame_dtype: torch.dtype = torch.float32
    """Type of the input: float32 for features, uint8 for video."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the parts that hold the weights, in the order of the forward pass: what is sharded one by one.

        None lies inside another, and the forward pass calls each of them exactly once.
        """

    @abstractmethod
    def forward(self, frames: Tensor, layout: TimeLayout) -> Tensor:
        """Return logits `[M, V]` of clips laid out by `layout`; `frames` `[N, *frame_shape]`, clip after clip."""
