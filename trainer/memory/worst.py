"""The worst cells of a plan, found without reading a feature: largest, longest single clip, most clips."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from trainer.data.allotment import allot
from trainer.data.plan import Plan
from trainer.layout import slot_frames
from trainer.memory.cells import load_of

Indices = npt.NDArray[np.int64]

_STEPS = 64
"""Steps of the first epoch that stand for all: every epoch is drawn uniformly."""
_NO_LIMIT = 1 << 53


@dataclass(frozen=True, kw_only=True)
class WorstCells:
    """Clips that cells of any size are made of, as frames after augmentation."""

    total_stride: int
    longest: int
    """Frames of the longest clip of the corpus, slowed down as far as augmentation may."""
    fullest: Indices
    """Clips of the fullest rank of a step, longest first."""
    shortest: Indices
    """The shortest clips met, shortest first."""
    padding: float
    """Padded output frames of a cell per slot, at the worst."""

    @property
    def floor(self) -> int:
        """Return the slots of the longest clip, which gets a cell to itself whatever the budget."""
        return int(slot_frames(np.array([self.longest]), self.total_stride)[0])

    @property
    def most(self) -> int:
        """Return the slots of the fullest rank in a step: no cell needs to hold more."""
        return max(self.floor, int(slot_frames(self.fullest, self.total_stride).sum()))

    def alone(self) -> Indices:
        """Return the longest clip alone."""
        return np.array([self.longest], dtype=np.int64)

    def largest(self, slots: int) -> Indices:
        """Fill at most `slots` as the fullest rank's clips would, longest first; the longest clip at the least."""
        return self._fill(np.concatenate([self.alone(), self.fullest]), slots)

    def most_clips(self, slots: int) -> Indices:
        """Fill at most `slots` with the shortest clips; one at the least."""
        return self._fill(self.shortest, slots)

    def _fill(self, clips: Indices, slots: int) -> Indices:
        each = slot_frames(clips, self.total_stride)
        rounds = max(1, -(-slots // int(each.sum())))
        clips, each = np.tile(clips, rounds), np.tile(each, rounds)
        count = max(1, int(np.searchsorted(np.cumsum(each), slots, side="right")))
        return clips[:count]


def find_worst(plan: Plan, *, size: int, world_size: int, budget: int) -> WorstCells:
    """Look through the plan's first steps of `size` clips, shared among `world_size` ranks, for its worst cells."""
    stride = plan.total_stride
    fullest, heaviest = np.empty(0, dtype=np.int64), -1
    seen: list[Indices] = []
    padding = 0.0
    for batch in islice(plan.batches(0, size), _STEPS):
        slots = slot_frames(batch.num_frames, stride)
        whole = allot(slots, world_size=world_size, budget=_NO_LIMIT)
        rank = int(whole.loads.argmax())
        if int(whole.loads[rank]) > heaviest:
            heaviest, fullest = int(whole.loads[rank]), batch.num_frames[whole.share(rank)]
        for cell in allot(slots, world_size=world_size, budget=budget).cells(rank):
            if len(cell):
                load = load_of(batch.num_frames[cell], stride)
                padding = max(padding, load.padded / load.slots)
        seen.append(np.sort(batch.num_frames)[:size])
    return WorstCells(
        total_stride=stride,
        longest=int(np.ceil(int(plan.num_frames.max()) * (1.0 + plan.augmentation.rescale))),
        fullest=fullest,
        shortest=np.sort(np.concatenate(seen))[: max(size, 64)],
        padding=padding,
    )
