"""Augmentation of feature clips, seeded by (seed, epoch, clip id).

How long a clip becomes is decided first, for the whole epoch at once and without touching a feature, because
the allotment needs the lengths; what happens inside the clip is drawn when it is read, and done by
`trainer.data.transform` where that is cheaper: on the device, or in the loader's threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from trainer.randomness import UInt64s, generator, uniform
from trainer.recipe import CorpusRecipe

Frames = npt.NDArray[np.int64]

# Salts keep the draws of one clip independent of each other.
_RESCALE, _DROP_COUNT, _CONTENT = 1, 2, 3
_NOISE_KEY = 4
NOISE_VALUES = 1 << 20
"""Places where a frame's noise may begin: 4 MB of values, which a processor's cache holds."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Strengths of the augmentation, as fractions of the clip or of its dimensions (noise: in standard deviations).

    Masks and noise are for features; `random_crop`, `flip` and `color` for video (`trainer.data.video.view`).
    """

    rescale: float = 0.2
    frame_drop: float = 0.1
    time_mask: float = 0.1
    feature_mask: float = 0.1
    noise: float = 0.05
    random_crop: bool = True
    flip: bool = False
    color: float = 0.2


NO_AUGMENTATION = Augmentation(
    rescale=0.0, frame_drop=0.0, time_mask=0.0, feature_mask=0.0, noise=0.0, random_crop=False, color=0.0
)


def augmentation_of(recipe: CorpusRecipe) -> Augmentation:
    """Return the strengths that a recipe asks for."""
    if not recipe.augment:
        return NO_AUGMENTATION
    return Augmentation(
        rescale=recipe.augment_rescale,
        frame_drop=recipe.augment_frame_drop,
        time_mask=recipe.augment_time_mask,
        feature_mask=recipe.augment_feature_mask,
        noise=recipe.augment_noise,
        flip=recipe.augment_flip,
        color=recipe.augment_color,
    )


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


@dataclass(frozen=True, kw_only=True)
class ClipDraw:
    """What augmentation makes of one clip: n frames, each between two of the clip's own.

    `before`, `after` `[n]`: the two frames; `share` `[n]`, float32: the weight of the second. `noise` `[n]`: where in
    the table of noise each frame's D values begin; None without noise. Spans are set to zero, the mean: `frame_spans`
    of the n frames, `dim_spans` of the D dimensions for the whole clip.
    """

    before: Frames
    after: Frames
    share: npt.NDArray[np.float32]
    noise: Frames | None
    frame_spans: tuple[tuple[int, int], ...]
    dim_spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.before)


def draw_clip(key: int, *, num_frames: int, dim: int, rescaled: int, kept: int, strengths: Augmentation) -> ClipDraw:
    """Draw the augmentation of a clip `[num_frames, dim]` to `kept` frames; `key` carries seed and epoch."""
    draws = generator(key, _CONTENT)
    before, after, share = positions(num_frames, rescaled)
    if kept < rescaled:
        chosen = np.sort(draws.permutation(rescaled)[:kept])
        before, after, share = before[chosen], after[chosen], share[chosen]
    noise = draws.integers(0, NOISE_VALUES, kept) if strengths.noise else None
    return ClipDraw(
        before=before,
        after=after,
        share=share,
        noise=noise,
        frame_spans=_spans(draws, kept, strengths.time_mask),
        dim_spans=_spans(draws, dim, strengths.feature_mask / 2),
    )


def positions(num_frames: int, resampled: int) -> tuple[Frames, Frames, npt.NDArray[np.float32]]:
    """Lay `resampled` frames evenly over `num_frames`, first and last in place: two neighbours and a share each."""
    if resampled == num_frames:
        same = np.arange(num_frames)
        return same, same, np.zeros(num_frames, dtype=np.float32)
    place = np.linspace(0.0, num_frames - 1.0, resampled)
    before = np.floor(place).astype(np.int64)
    return before, np.minimum(before + 1, num_frames - 1), (place - before).astype(np.float32)


@lru_cache(maxsize=2)
def noise_table(dim: int) -> npt.NDArray[np.float32]:
    """Return standard normal values `[NOISE_VALUES + dim]`, the same everywhere.

    A frame's noise is `dim` of them from a place drawn for it (Salimans et al. 2017 share noise so): drawing every
    value anew cost more than all other work on a clip, and a draw per value would be one more per device.
    """
    return generator(_NOISE_KEY, dim).standard_normal(NOISE_VALUES + dim, dtype=np.float32)


def _spans(draws: np.random.Generator, length: int, fraction: float) -> tuple[tuple[int, int], ...]:
    """Draw two spans of up to `fraction` of a length, so that a clip is sometimes left almost whole."""
    spans = []
    for _ in range(2):
        span = int(draws.integers(0, int(fraction * length) + 1))
        start = int(draws.integers(0, length - span + 1))
        spans.append((start, start + span))
    return tuple(spans)
