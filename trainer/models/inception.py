"""The inception network of I3D (Carreira & Zisserman 2017, after Szegedy et al. 2015) with time as its one dimension.

The block structure, branch widths and temporal strides are the published ones; what was spatial is gone, because the
frames arrive as features. Normalisation is per frame (LayerNorm over channels) instead of per batch, so that a clip's
output does not depend on its neighbours, and every block ends by silencing the guards between clips.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.layout import TimeLayout

MIXED_BLOCKS: dict[str, tuple[int, int, int, int, int, int]] = {
    # 1, 3 reduced, 3, 3 reduced, 3, pooled: output channels of each unit in a block, as published.
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


# Blocks start close to their shortcut, so that the first gradients reach the features through nine of them.
_BRANCH_SCALE = 0.2


def scale_channels(channels: int, width: float) -> int:
    """Scale a channel count, to a multiple of 8 and never below 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


class TemporalConv(nn.Conv1d):
    """Convolve frames `[L, C]` in time; ReLU networks' initialisation (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[L, C_in]` to `[L / stride, C_out]`."""
        if self.kernel_size == (1,):
            return F.linear(x, self.weight[:, :, 0], self.bias)
        return super().forward(x.t().unsqueeze(0)).squeeze(0).t()


class Unit(nn.Module):
    """Convolution, normalisation per frame, ReLU, silence in the guards."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = TemporalConv(inputs, outputs, kernel, stride)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `[L, C_in]` to `[L / stride, C_out]`; `mask` `[L / stride, 1]`."""
        return F.relu(self.norm(self.conv(x))) * mask


class Mixed(nn.Module):
    """One inception block: four branches, concatenated and normalised together.

    The narrow reductions inside a block (16 channels and fewer) are left unnormalised: a LayerNorm over so few
    channels would throw information away.
    """

    def __init__(self, inputs: int, outputs: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = TemporalConv(inputs, outputs[0], 1)
        self.b1a = TemporalConv(inputs, outputs[1], 1)
        self.b1b = TemporalConv(outputs[1], outputs[2], 3)
        self.b2a = TemporalConv(inputs, outputs[3], 1)
        self.b2b = TemporalConv(outputs[3], outputs[4], 3)
        self.b3b = TemporalConv(inputs, outputs[5], 1)
        self.channels = outputs[0] + outputs[2] + outputs[4] + outputs[5]
        self.norm = nn.LayerNorm(self.channels)
        nn.init.constant_(self.norm.weight, _BRANCH_SCALE)
        # The published widths only grow, so that a shortcut needs no weights (option A of He et al. 2016).
        self.new_channels = self.channels - inputs

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `[L, C_in]`, silent and non-negative, to `[L, channels]` of the same kind."""
        branches = [
            self.b0(x),
            self.b1b(F.relu(self.b1a(x)) * mask),
            self.b2b(F.relu(self.b2a(x)) * mask),
            self.b3b(pool(x)),
        ]
        shortcut = F.pad(x, (0, self.new_channels))
        return F.relu(shortcut + self.norm(torch.cat(branches, dim=1))) * mask


def pool(x: Tensor, stride: int = 1) -> Tensor:
    """Take the maximum over three frames, `[L, C]` to `[L / stride, C]`; silent guards never win over x >= 0."""
    return F.max_pool1d(x.t().unsqueeze(0), 3, stride=stride, padding=1).squeeze(0).t()


def average(x: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Average `stride` silent frames at a time, `[L, C]` to `[L / stride, C]`; guards, zero in `mask`, do not count."""
    if stride == 1:
        return x
    counts = mask.view(-1, stride).sum(dim=1, keepdim=True)
    return x.view(-1, stride, x.shape[1]).sum(dim=1) / counts.clamp(min=1.0)


class Inception(nn.Module):
    """Embed frames in time: `[L, inputs]` to `[L / total_stride, channels]`.

    The published network halves time in its first convolution, before Mixed_4b and before Mixed_5b (total
    stride 8, at which CTC runs out of frames); here the first `log2(total_stride)` of the three do.
    """

    def __init__(self, inputs: int, total_stride: int, width: float) -> None:
        super().__init__()
        self.first_stride = 2 if total_stride >= 2 else 1
        self.total_stride = total_stride
        stem, reduced = scale_channels(512, width), scale_channels(192, width)
        self.Conv_1a_7 = Unit(inputs, stem, 7, self.first_stride)
        self.Conv_2b_1 = Unit(stem, stem, 1)
        self.Conv_2c_3 = Unit(stem, reduced, 3)
        self.mixed = nn.ModuleDict()
        channels = reduced
        for name, published in MIXED_BLOCKS.items():
            a, b, c, d, e, f = (scale_channels(n, width) for n in published)
            block = Mixed(channels, (a, b, c, d, e, f))
            self.mixed[name] = block
            channels = block.channels
        self.channels = channels
        self.norm = nn.LayerNorm(channels)

    def blocks(self) -> list[nn.Module]:
        """Return the units and blocks that hold the weights, in the order of the forward pass."""
        return [self.Conv_1a_7, self.Conv_2b_1, self.Conv_2c_3, *self.mixed.values()]

    def forward(self, x: Tensor, layout: TimeLayout) -> Tensor:
        """Run the network on silent, laid-out frames."""
        mask = layout.masks[self.first_stride]
        x = self.Conv_1a_7(x, mask)
        x = self.Conv_2c_3(self.Conv_2b_1(x, mask), mask)
        for name, block in self.mixed.items():
            if name == "Mixed_4b" and self.total_stride > self.first_stride:
                mask = layout.masks[self.total_stride]
                x = pool(x, self.total_stride // self.first_stride) * mask
            x = block(x, mask)
        return self.norm(x)
