"""The student over per-frame features: small, fast on a CPU, and trained, laid out and scored as the teacher is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.layout import TimeLayout
from trainer.models.features import FeatureRecognizer
from trainer.models.inception import average, scale_channels
from trainer.models.temporal_head import TemporalHead

_CHANNELS = 192
_EXPANSION = 2
_KERNELS = (7, 5, 5, 5, 3, 3, 3)
"""Kernel of each block. No reach is longer than the guard at its stride: 3, 2 and 1 frames at strides 1, 2 and 4."""
_SECOND_STRIDE = 3
"""The block that divides time for the second time; the first one does for the first."""

# Blocks start close to their shortcut, so that the first gradients reach the features through all of them.
_BRANCH_SCALE = 0.2


class FeatureStudent(FeatureRecognizer):
    """Map clips of features to gloss logits; about 3.7 M parameters at D = 6516 and 1,296 classes.

    The inverted residuals of MobileNet (Sandler et al. 2018, Howard et al. 2019) with time as their one dimension and
    LayerNorm per frame, so that a clip's output does not depend on its neighbours. No squeeze-and-excitation: its
    mean over the whole clip would cost a pass over it for little that the BiLSTM does not see.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        num_classes: int,
        total_stride: int = 4,
        width: float = 1.0,
        rnn_size: int = 192,
        rnn_layers: int = 1,
        dropout: float = 0.3,
        streams: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        channels = scale_channels(_CHANNELS, width)
        super().__init__(feature_dim=feature_dim, channels=channels, total_stride=total_stride, streams=streams)
        self.strides = [1] * len(_KERNELS)
        self.strides[0], self.strides[_SECOND_STRIDE] = min(total_stride, 2), max(total_stride // 2, 1)
        self.time = nn.ModuleList(
            InvertedResidual(channels, kernel, stride) for kernel, stride in zip(_KERNELS, self.strides, strict=True)
        )
        self.norm = nn.LayerNorm(channels)
        self.head = TemporalHead(
            2 * channels, rnn_size=rnn_size, rnn_layers=rnn_layers, dropout=dropout, num_classes=num_classes
        )

    def blocks(self) -> list[nn.Module]:
        """Return the embedding, the blocks in time and the head; the norm between them is too small to be one."""
        return [self.embed, *self.time, self.head]

    def in_time(self, x: Tensor, layout: TimeLayout) -> Tensor:
        """Return what the inverted residuals make of embedded frames."""
        reached = 1
        for block, stride in zip(self.time, self.strides, strict=True):
            mask, reached = layout.masks[reached], reached * stride
            x = block(x, mask, layout.masks[reached])
        return self.norm(x)


class InvertedResidual(nn.Module):
    """Expand the channels of each frame, convolve each channel in time, project back, add the shortcut."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, _EXPANSION * channels)
        self.depthwise = DepthwiseConv(_EXPANSION * channels, kernel, stride)
        self.project = nn.Linear(_EXPANSION * channels, channels)
        with torch.no_grad():
            self.project.weight *= _BRANCH_SCALE

    def forward(self, x: Tensor, mask: Tensor, strided_mask: Tensor) -> Tensor:
        """Map `[L, C]`, silent in the guards, to `[L / stride, C]` of the same kind; the masks are those of both."""
        hidden = F.hardswish(self.expand(self.norm(x))) * mask
        hidden = F.hardswish(self.depthwise(hidden))
        return (average(x, mask, self.stride) + self.project(hidden)) * strided_mask


class DepthwiseConv(nn.Conv1d):
    """Convolve each channel of frames `[L, C]` in time, for itself."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(channels, channels, kernel, stride=stride, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[L, C]` to `[L / stride, C]`."""
        return super().forward(x.t().unsqueeze(0)).squeeze(0).t()
