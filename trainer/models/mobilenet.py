"""The video student: MobileNetV3 per frame (Howard et al. 2019), convolution in time, BiLSTM, CTC head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.layout import TimeLayout
from trainer.models.inception import Unit, scale_channels
from trainer.models.norms import Norm, norm_layer
from trainer.models.recognizer import Recognizer
from trainer.models.temporal_head import TemporalHead
from trainer.models.vision import make_mobilenet

_TEMPORAL_CHANNELS = 256

# Of ImageNet, on which the shared weights were trained; torchvision's numbers.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def count_channels(images: nn.Sequential) -> int:
    """Return the number of channels that the last convolution of a network makes."""
    return [module.out_channels for module in images.modules() if isinstance(module, nn.Conv2d)][-1]


class TemporalConvolution(nn.Module):
    """Two convolutions over five frames each, which bring the stride: `[L, inputs]` to `[L / stride, outputs]`."""

    def __init__(self, inputs: int, outputs: int, total_stride: int) -> None:
        super().__init__()
        self.first_stride, self.total_stride = min(total_stride, 2), total_stride
        self.first = Unit(inputs, outputs, 5, self.first_stride)
        self.second = Unit(outputs, outputs, 5, total_stride // self.first_stride)

    def forward(self, x: Tensor, layout: TimeLayout) -> Tensor:
        """Convolve laid-out frames, silent between clips."""
        return self.second(self.first(x, layout.masks[self.first_stride]), layout.masks[self.total_stride])


class MobileNetStudent(Recognizer):
    """Map clips of frames of any size to gloss logits.

    The 2-D network sees all frames of a micro-batch as one batch of images: none of them is padding.
    """

    frame_shape = (-1, -1, 3)
    frame_dtype = torch.uint8

    def __init__(
        self,
        *,
        architecture: str,
        num_classes: int,
        total_stride: int = 4,
        width: float = 1.0,
        norm: Norm = "group",
        rnn_size: int = 256,
        rnn_layers: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.total_stride = total_stride
        self.backbone = nn.ModuleDict(
            # Under the name that torchvision's checkpoints give it.
            {"features": make_mobilenet(architecture, width=width, make_norm=norm_layer(norm))}
        )
        outputs = scale_channels(_TEMPORAL_CHANNELS, width)
        self.temporal = TemporalConvolution(count_channels(self._images()), outputs, total_stride)
        self.head = TemporalHead(
            outputs, rnn_size=rnn_size, rnn_layers=rnn_layers, dropout=dropout, num_classes=num_classes
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN) * 255)
        self.register_buffer("std", torch.tensor(_STD) * 255)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of MobileNetV3, the convolution in time and the head."""
        return [*self._images(), self.temporal, self.head]

    def visual(self, frames: Tensor, layout: TimeLayout) -> Tensor:
        """Return visual features `[L / stride, C]`; `frames` uint8 `[N, H, W, 3]`, clip after clip."""
        # Channels last in memory, as the frames come.
        x = ((frames - self.mean) / self.std).permute(0, 3, 1, 2)
        for block in self._images():
            x = block(x)
        x = x.mean(dim=(2, 3))
        laid_out = x.new_zeros(layout.length, x.shape[1]).index_copy(0, layout.frame_positions, x)
        return self.temporal(laid_out, layout)

    def _images(self) -> nn.Sequential:
        features = self.backbone["features"]
        assert isinstance(features, nn.Sequential)
        return features
