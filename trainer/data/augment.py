"""Augmentation of feature clips, seeded by (seed, epoch, clip id).

How long a clip becomes is decided first, for the whole epoch at once and without touching a feature, because
the allotment needs the lengths; what happens inside the clip follows when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.randomness import UInt64s, generator, uniform

Frames = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]

# Salts keep the draws of one clip independent of each other.
_RESCALE, _DROP_COUNT, _CONTENT = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Strengths of the augmentation, as fractions of the clip or of its dimensions (noise: in standard deviations)."""

    rescale: float = 0.2
    frame_drop: float = 0.1
    time_mask: float = 0.1
    feature_mask: float = 0.1
    noise: float = 0.05


NO_AUGMENTATION = Augmentation(rescale=0.0, frame_drop=0.0, time_mask=0.0, feature_mask=0.0, noise=0.0)


@dataclass(frozen=True, kw_only=True)
class ClipLengths:
    """Frames of every clip of an epoch: after temporal rescaling, and after frames were dropped (`kept`)."""

    rescaled: Frames
    kept: Frames


def augmented_lengths(num_frames: Frames, min_frames: Frames, keys: UInt64s, strengths: Augmentation) -> ClipLengths:
    """Decide the length of every clip of an epoch.

    `num_frames`, `min_frames`, `keys`: `[N]`; `min_frames` is the fewest frames at which CTC stays feasible, and
    no clip gets shorter than that. `keys` already carry seed and epoch.
    """
    speed = 1.0 + strengths.rescale * (2.0 * uniform(keys, _RESCALE) - 1.0)
    rescaled = np.maximum(np.rint(num_frames * speed).astype(np.int64), min_frames)
    dropped = np.floor(rescaled * strengths.frame_drop * uniform(keys, _DROP_COUNT)).astype(np.int64)
    return ClipLengths(rescaled=rescaled, kept=np.maximum(rescaled - dropped, min_frames))


def resample(features: Features, num_frames: int) -> Features:
    """Resample `[T, D]` linearly in time to `[num_frames, D]`, first and last frame kept in place."""
    if num_frames == len(features):
        return features
    position = np.linspace(0.0, len(features) - 1.0, num_frames)
    before = np.floor(position).astype(np.int64)
    after = np.minimum(before + 1, len(features) - 1)
    share = (position - before).astype(np.float32)[:, None]
    return features[before] * (1.0 - share) + features[after] * share


def augment(features: Features, key: int, *, rescaled: int, kept: int, strengths: Augmentation) -> Features:
    """Augment one normalised clip `[T, D]` to `[kept, D]`; zero is the mean that masks are filled with."""
    draws = generator(key, _CONTENT)
    clip = resample(features, rescaled)
    if kept < rescaled:
        clip = clip[np.sort(draws.permutation(rescaled)[:kept])]
    clip = np.array(clip, dtype=np.float32)
    if strengths.noise:
        clip += strengths.noise * draws.standard_normal(clip.shape, dtype=np.float32)
    for axis, fraction in ((0, strengths.time_mask), (1, strengths.feature_mask / 2)):
        frames_or_dims = clip if axis == 0 else clip.T
        for _ in range(2):
            # The span is drawn up to the fraction, so that a clip is sometimes left almost whole.
            span = int(draws.integers(0, int(fraction * len(frames_or_dims)) + 1))
            start = int(draws.integers(0, len(frames_or_dims) - span + 1))
            frames_or_dims[start : start + span] = 0.0
    return clip
