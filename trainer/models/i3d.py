"""I3D: Inception-v1 inflated to space and time (Carreira & Zisserman 2017), on clips laid end to end.

Names and shapes of the weights are those of the PyTorch port whose Kinetics checkpoints are widely shared, and so is
the padding ("SAME": half of what a kernel reaches over the edge before it, the larger half behind). In time, silence
between clips stands for that padding; every unit silences it again, since normalisation does not keep zeros.

The published network halves time in its first convolution, before Mixed_4b and before Mixed_5b (total stride 8, at
which CTC runs out of frames); here the first `log2(total_stride)` of the three do. The pooling before Mixed_4b keeps
its reach of three frames at any stride. That before Mixed_5b, whose two frames have no middle, is left with one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.layout import TimeLayout
from trainer.models.inception import MIXED_BLOCKS, scale_channels
from trainer.models.norms import Norm, norm_layer
from trainer.models.recognizer import Recognizer
from trainer.models.temporal_head import TemporalHead

_CHANNELS = {"Conv3d_1a_7x7": 64, "Conv3d_2b_1x1": 64, "Conv3d_2c_3x3": 192}

MakeNorm = Callable[[int], nn.Module]


class Unit3D(nn.Module):
    """Convolution with SAME padding, normalisation, silence in the guards, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, strides: tuple[int, int], make_norm: MakeNorm) -> None:
        super().__init__()
        stride = (strides[0], strides[1], strides[1])
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride=stride, bias=False)
        self.bn = make_norm(outputs)
        nn.init.kaiming_normal_(self.conv3d.weight, nonlinearity="relu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `[1, C, L, H, W]` to `[1, C', L / stride, …]`; `mask` `[1, 1, L / stride, 1, 1]`."""
        kernel, strides = self.conv3d.kernel_size[0], self.conv3d.stride
        padding = [same_padding(size, kernel, stride) for size, stride in zip(x.shape[2:], strides, strict=True)]
        weight = self.conv3d.weight
        if all(before == after for before, after in padding):
            x = F.conv3d(x, weight, stride=strides, padding=tuple(before for before, _ in padding))
        else:
            x = F.conv3d(F.pad(x, [side for pair in reversed(padding) for side in pair]), weight, stride=strides)
        # In place, and silenced before the ReLU: of the three results only the last is kept for the backward pass.
        return F.relu_(self.bn(x).mul_(mask))


class Mixed3D(nn.Module):
    """One inception block: four branches, concatenated."""

    def __init__(self, inputs: int, outputs: tuple[int, int, int, int, int, int], make_norm: MakeNorm) -> None:
        super().__init__()
        a, b, c, d, e, f = outputs
        once = (1, 1)
        self.b0 = Unit3D(inputs, a, 1, once, make_norm)
        self.b1a = Unit3D(inputs, b, 1, once, make_norm)
        self.b1b = Unit3D(b, c, 3, once, make_norm)
        self.b2a = Unit3D(inputs, d, 1, once, make_norm)
        self.b2b = Unit3D(d, e, 3, once, make_norm)
        self.b3b = Unit3D(inputs, f, 1, once, make_norm)
        self.channels = a + c + e + f

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `[1, C, L, H, W]`, silent and non-negative, to `[1, channels, L, H, W]` of the same kind."""
        branches = [
            self.b0(x, mask),
            self.b1b(self.b1a(x, mask), mask),
            self.b2b(self.b2a(x, mask), mask),
            self.b3b(pool(x, (3, 3), (1, 1)), mask),
        ]
        return torch.cat(branches, dim=1)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding before and behind that gives `ceil(size / stride)` outputs."""
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


def pool(x: Tensor, kernels: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    """Take maxima with SAME padding; kernels and strides in time and in space, x >= 0.

    Over non-negative values zeros never win, so that windows cut off at the edge (`ceil_mode`) do what padding does.
    """
    kernel, stride = (kernels[0], kernels[1], kernels[1]), (strides[0], strides[1], strides[1])
    before = [same_padding(*sizes)[0] for sizes in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.max_pool3d(x, kernel, stride, padding=before, ceil_mode=True)


class I3D(nn.Module):
    """Embed frames: `[1, 3, L, H, W]` in [-1, 1], silent between clips, to `[1, channels, L / total_stride, …]`."""

    def __init__(self, *, total_stride: int, width: float, norm: Norm) -> None:
        super().__init__()
        self.first_stride, self.total_stride = min(total_stride, 2), total_stride
        make_norm = norm_layer(norm)
        stem, second, third = (scale_channels(n, width) for n in _CHANNELS.values())
        self.Conv3d_1a_7x7 = Unit3D(3, stem, 7, (self.first_stride, 2), make_norm)
        self.Conv3d_2b_1x1 = Unit3D(stem, second, 1, (1, 1), make_norm)
        self.Conv3d_2c_3x3 = Unit3D(second, third, 3, (1, 1), make_norm)
        self.channels = third
        for name, published in MIXED_BLOCKS.items():
            a, b, c, d, e, f = (scale_channels(n, width) for n in published)
            block = Mixed3D(self.channels, (a, b, c, d, e, f), make_norm)
            self.add_module(name, block)
            self.channels = block.channels

    def blocks(self) -> list[nn.Module]:
        """Return the units and blocks that hold the weights, in the order of the forward pass."""
        return list(self.children())

    def forward(self, x: Tensor, layout: TimeLayout) -> Tensor:
        """Run the network up to Mixed_5c."""
        masks = {stride: mask.view(1, 1, -1, 1, 1) for stride, mask in layout.masks.items()}
        mask = masks[self.first_stride]
        x = pool(self.Conv3d_1a_7x7(x, mask), (1, 3), (1, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x, mask), mask)
        x = pool(x, (1, 3), (1, 2))
        for name in MIXED_BLOCKS:
            if name == "Mixed_4b":
                mask = masks[self.total_stride]
                # A maximum in time spreads into the guards, where the next convolution would hear it.
                x = pool(x, (3, 3), (self.total_stride // self.first_stride, 2)).mul_(mask)
            if name == "Mixed_5b":
                x = pool(x, (1, 2), (1, 2))
            x = getattr(self, name)(x, mask)
        return x


class SpatialMean(nn.Module):
    """Take the mean over space and normalise it per frame, since backbones differ in scale and the BiLSTM saturates."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[1, C, L, H, W]` to `[L, C]`."""
        return self.norm(x.mean(dim=(3, 4)).squeeze(0).t())


class I3DTeacher(Recognizer):
    """I3D over frames of any size, BiLSTM, CTC head; 12.3 M parameters without BiLSTM and head."""

    frame_shape = (-1, -1, 3)
    frame_dtype = torch.uint8

    def __init__(
        self,
        *,
        num_classes: int,
        total_stride: int = 4,
        width: float = 1.0,
        norm: Norm = "group",
        rnn_size: int = 512,
        rnn_layers: int = 2,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.total_stride = total_stride
        self.backbone = I3D(total_stride=total_stride, width=width, norm=norm)
        self.mean = SpatialMean(self.backbone.channels)
        self.head = TemporalHead(
            self.backbone.channels,
            rnn_size=rnn_size,
            rnn_layers=rnn_layers,
            dropout=dropout,
            num_classes=num_classes,
        )

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of I3D, the mean over space and the head."""
        return [*self.backbone.blocks(), self.mean, self.head]

    def visual(self, frames: Tensor, layout: TimeLayout) -> Tensor:
        """Return visual features `[L / stride, C]`; `frames` uint8 `[N, H, W, 3]`, clip after clip."""
        silence = torch.zeros(layout.length, *frames.shape[1:], device=frames.device)
        laid_out = silence.index_copy_(0, layout.frame_positions, frames.float().mul_(2 / 255).sub_(1))
        # Channels last in memory, as the frames come.
        x = self.backbone(laid_out.permute(3, 0, 1, 2).unsqueeze(0), layout)
        return self.mean(x)
