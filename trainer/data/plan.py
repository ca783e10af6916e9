"""The plan: which clips make up each optimizer step. It has never heard of ranks.

A pure function of (clips, recipe, seed, epoch). A cursor into it is the epoch and the number of its clips already
used, so that a run goes on with exactly the clips not yet seen even where the global batch has another size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trainer.data.augment import NO_AUGMENTATION, Augmentation, ClipLengths, augmented_lengths
from trainer.randomness import UInt64s, generator, mix

Indices = npt.NDArray[np.int64]
Chosen: TypeAlias = Indices | slice

_ALL = slice(None)
_ORDER, _AUGMENT, _MIXUP, _DROPOUT, _WINDOW = 11, 12, 13, 14, 15


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The clips of one optimizer step, `[n]` each.

    `clips` index the training clips; `partners` and `shares` describe temporal mixup: clip i enters with weight
    `shares[i]`, its partner with the rest (a clip that is not mixed is its own partner with share 1).
    `num_frames` are the frames after augmentation.
    """

    epoch: int
    position: int
    clips: Indices
    partners: Indices
    shares: npt.NDArray[np.float64]
    num_frames: Indices

    def __len__(self) -> int:
        return len(self.clips)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All global batches of a run over `N` training clips.

    `num_frames`, `min_outputs` (glosses plus adjacent repeats), `keys`: `[N]`; they may be mapped from an index, and
    what is derived from them is derived for the clips at hand alone.
    """

    num_frames: npt.NDArray[np.integer[Any]]
    min_outputs: npt.NDArray[np.integer[Any]]
    keys: UInt64s
    total_stride: int
    seed: int
    augmentation: Augmentation = NO_AUGMENTATION
    mixup_alpha: float = 0.0
    shuffle_window: int = 1

    @property
    def num_clips(self) -> int:
        """Count the clips of an epoch."""
        return len(self.num_frames)

    def order(self, epoch: int) -> npt.NDArray[np.int32]:
        """Draw the order of all clips in an epoch, uniformly."""
        # Half the memory of int64, which a rank among thousands holds for every clip there is.
        return generator(self.seed, _ORDER, epoch).permutation(np.arange(self.num_clips, dtype=np.int32))

    def lengths(self, epoch: int, clips: Chosen = _ALL) -> ClipLengths:
        """Decide the frames of the chosen clips, `[n]`, in an epoch."""
        num_frames = self.num_frames[clips].astype(np.int64)
        if self.augmentation == NO_AUGMENTATION:
            return ClipLengths(rescaled=num_frames, kept=num_frames)
        # ceil(T / stride) >= outputs holds from the first frame of the last needed stride on.
        min_frames = (self.min_outputs[clips].astype(np.int64) - 1) * self.total_stride + 1
        return augmented_lengths(
            num_frames, np.minimum(min_frames, num_frames), self.augment_keys(epoch, clips), self.augmentation
        )

    def augment_keys(self, epoch: int, clips: Chosen = _ALL) -> UInt64s:
        """Derive the key of each chosen clip's augmentation in an epoch."""
        return mix(self.keys[clips], _AUGMENT, self.seed, epoch)

    def dropout_keys(self, epoch: int, clips: Chosen = _ALL) -> UInt64s:
        """Derive the key of each chosen clip's dropout in an epoch."""
        return mix(self.keys[clips], _DROPOUT, self.seed, epoch)

    def sequence(self, epoch: int, size: int, position: int = 0) -> Iterator[Indices]:
        """Yield runs of an epoch's clips, from the one at `position` on, in the order they are used.

        Each window of `shuffle_window` global batches of `size` is drawn uniformly, sorted by length as a whole and
        cut, and its batches are shuffled: the clips of a step are of like length, the lengths of successive steps are
        not ordered. No work is done for a window before it is asked for.
        """
        order = self.order(epoch)
        # The short batch at the end stays as it was drawn: sorted in, it would hold an epoch's extremes.
        whole = self.num_clips - self.num_clips % size if self.shuffle_window > 1 else 0
        span = self.shuffle_window * size
        for start in range(position // span * span, whole, span):
            window = order[start : min(start + span, whole)].astype(np.int64)
            frames = self.lengths(epoch, window).kept
            batches = window[np.argsort(frames, kind="stable")].reshape(-1, size)
            shuffled = generator(self.seed, _WINDOW, epoch, start).permutation(len(batches))
            yield batches[shuffled].reshape(-1)[max(0, position - start) :]
        for start in range(max(whole, position), self.num_clips, size):
            yield order[start : start + size].astype(np.int64)

    def batches(self, epoch: int, size: int, position: int = 0, drawn_size: int = 0) -> Iterator[GlobalBatch]:
        """Yield the global batches of an epoch from the clip at `position` on; the last one may be smaller.

        `drawn_size` is the size of the global batch when the epoch began, if it has changed since: the order must stay
        the one whose first `position` clips were used.
        """
        ready = np.empty(0, dtype=np.int64)
        for run in self.sequence(epoch, drawn_size or size, position):
            ready = np.concatenate([ready, run])
            while len(ready) >= size:
                yield self._batch(epoch, position, ready[:size])
                ready, position = ready[size:], position + size
        if len(ready):
            yield self._batch(epoch, position, ready)

    def _batch(self, epoch: int, position: int, clips: Indices) -> GlobalBatch:
        frames = self.lengths(epoch, clips).kept
        partners, shares = self._mixup(epoch, position, clips, frames)
        return GlobalBatch(
            epoch=epoch, position=position, clips=clips, partners=partners, shares=shares, num_frames=frames
        )

    def _mixup(
        self, epoch: int, start: int, clips: Indices, frames: Indices
    ) -> tuple[Indices, npt.NDArray[np.float64]]:
        if not self.mixup_alpha:
            return clips, np.ones(len(clips))
        draws = generator(self.seed, _MIXUP, epoch, start)
        partners = clips[draws.permutation(len(clips))]
        shares = draws.beta(self.mixup_alpha, self.mixup_alpha, len(clips))
        # The clip that gives the length also gives the larger part of the content.
        shares = np.maximum(shares, 1.0 - shares)
        outputs = -(-frames // self.total_stride)
        alone = (partners == clips) | (self.min_outputs[partners] > outputs)
        return np.where(alone, clips, partners), np.where(alone, 1.0, shares)
