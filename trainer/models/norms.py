"""What becomes of the BatchNorm of video backbones, so that a clip's output stays its own.

Statistics of a batch would make a clip's logits depend on its neighbours, and a step on how its clips are cut into
micro-batches and ranks. `frozen` keeps the statistics that came with loaded weights. `group` takes them from each frame
(Wu & He 2018), which needs none loaded. Both leave the names and shapes of BatchNorm's weight and bias as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["frozen", "group"]

# As both published backbones have it.
_EPS = 1e-3
_CHANNELS_PER_GROUP = 16


class FrozenBatchNorm(nn.BatchNorm3d):
    """BatchNorm by its loaded statistics, in training too; weight and bias learn. Channels are the second dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPS)
        # Modules are made in training mode.
        self.train(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation: the statistics never move."""
        super().train(False)
        return self

    def _check_input_dim(self, input: Tensor) -> None:
        """Take images and volumes alike."""


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm within each frame, never across time; groups of 16 channels, or 8 where 16 do not divide them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels // math.gcd(channels, _CHANNELS_PER_GROUP), channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images `[N, C, H, W]`, or one volume `[1, C, L, H, W]` frame by frame."""
        if x.ndim == 4:
            return super().forward(x)
        frames = x.squeeze(0).transpose(0, 1)
        normed = F.group_norm(frames, self.num_groups, self.weight, self.bias, self.eps)
        return normed.transpose(0, 1).unsqueeze(0)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Return what makes the normalisation of a number of channels."""
    return FrameGroupNorm if norm == "group" else FrozenBatchNorm
