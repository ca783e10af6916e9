"""Views: which frames of a clip training sees, which part of them, and in which light.

Drawn per clip as a pure function of (seed, epoch, clip id), and the same for all frames of the clip: a crop or a
colour that jumps from frame to frame would be movement that nobody signed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.augment import Augmentation, positions
from trainer.randomness import generator

Frames = npt.NDArray[np.int64]

_VIEW = 5


@dataclass(frozen=True, kw_only=True)
class Color:
    """Factors of a clip's brightness, contrast (around its mean grey) and saturation; 1 leaves it as it is."""

    brightness: float
    contrast: float
    saturation: float


@dataclass(frozen=True, kw_only=True)
class View:
    """What is taken of a clip: `frames` `[n]`, in order; the crop's corner in pixels; mirrored or not; the light."""

    frames: Frames
    top: int
    left: int
    flip: bool = False
    color: Color | None = None


def central_view(num_frames: int, *, frame_size: int, crop_size: int) -> View:
    """Take all frames, and the middle of them."""
    corner = (frame_size - crop_size) // 2
    return View(frames=np.arange(num_frames), top=corner, left=corner)


def draw_view(
    key: int,
    *,
    num_frames: int,
    rescaled: int,
    kept: int,
    frame_size: int,
    crop_size: int,
    strengths: Augmentation,
) -> View:
    """Draw the view of a clip of `num_frames` that becomes `kept` frames; `key` carries seed and epoch.

    A clip is stretched by the nearest of its own frames: a mean of two would show four hands.
    """
    draws = generator(key, _VIEW)
    before, after, share = positions(num_frames, rescaled)
    frames = np.where(share < 0.5, before, after)
    top, left = draws.integers(0, frame_size - crop_size + 1, 2)
    if not strengths.random_crop:
        top = left = (frame_size - crop_size) // 2
    flip = draws.random() < 0.5
    factors = 1.0 + strengths.color * (2.0 * draws.random(3) - 1.0)
    if kept < rescaled:
        frames = frames[np.sort(draws.permutation(rescaled)[:kept])]
    return View(
        frames=frames,
        top=int(top),
        left=int(left),
        flip=bool(flip) and strengths.flip,
        color=Color(brightness=float(factors[0]), contrast=float(factors[1]), saturation=float(factors[2]))
        if strengths.color
        else None,
    )
