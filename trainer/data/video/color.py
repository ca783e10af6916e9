"""The light of a clip, changed where the clip is: on a device, or in the loader's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.video.view import Color

# Luma of ITU-R BT.601, by which Pillow and torchvision turn colours into grey.
_LUMA = (0.299, 0.587, 0.114)
_CHUNK_FRAMES = 16
"""Frames whose float copies exist at once."""


def apply_color(frames: Tensor, color: Color) -> None:
    """Change the light of a clip in place, uint8 `[n, H, W, 3]`, on whichever device it is.

    The three changes follow each other without clipping in between, so they are one mixture of a pixel's colour, its
    grey and the clip's mean grey. Sums of integers are exact: every device and any number of threads agree on the mean.
    """
    luma = torch.tensor(_LUMA, dtype=torch.float64)
    channels = frames.sum(dim=(0, 1, 2), dtype=torch.int64).cpu().double()
    mean_grey = float(channels @ luma) / max(1, frames.numel() // 3)
    gain = color.brightness * color.contrast
    own, grey = gain * color.saturation, gain * (1.0 - color.saturation)
    offset = color.brightness * (1.0 - color.contrast) * mean_grey
    for start in range(0, len(frames), _CHUNK_FRAMES):
        block = frames[start : start + _CHUNK_FRAMES]
        pixels = block.float()
        common = pixels[..., 0] * (grey * _LUMA[0])
        common += pixels[..., 1] * (grey * _LUMA[1])
        common += pixels[..., 2] * (grey * _LUMA[2])
        common += offset
        block.copy_(pixels.mul_(own).add_(common[..., None]).round_().clamp_(0.0, 255.0))
