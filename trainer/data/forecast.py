"""The forecast: what a plan costs on ranks that are not there, from lengths alone.

Uses the plan and the allotment of the trainer itself. Work is bounded: in a long epoch the first steps stand for all,
since every epoch is drawn uniformly; of a corpus of millions, clips drawn at random stand for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from trainer.data.allotment import Allotment, allot
from trainer.data.cost import FRAMES_ONLY, CostModel, share_counts
from trainer.data.plan import GlobalBatch, Plan
from trainer.layout import slot_frames
from trainer.randomness import generator

Indices = npt.NDArray[np.int64]

SHUFFLE_WINDOWS = (1, 2, 4, 8, 16, 32)
MOST_OVER_IDEAL = 1.05

_STEPS, _FEW_CLIPS, _MANY_CLIPS = 100, 1 << 14, 1 << 19
"""Measured of an epoch: so many steps, more of them if they have few clips in all, fewer if very many."""
_SEARCH_STEPS = 16
"""Steps that judge a shuffle window, and two whole windows at least."""
_ALL_CLIPS = 1 << 20
"""Corpora up to this size are planned as they are; the order of 10 million clips takes most of a second to draw."""
_SAMPLE = 16
_RANKS_CUT = 16
"""Ranks of a step whose cells are cut to find the slowest, the most loaded ones."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Means over the measured steps, at one world size."""

    world_size: int
    batch_clips: int
    """Clips of a full global batch, or of the epoch if it has fewer."""
    steps_per_epoch: int
    steps_measured: int
    """Full steps that the means are over; where an epoch has none, its short one."""
    cells_per_rank: float
    padding: float
    """Share of the computed frames that are no clip's: guards."""
    imbalance: float
    """Load of the fullest rank over the mean of all, in what the allotment balances by."""
    step_over_ideal: float
    """Slots of the fullest rank over the mean of real frames per rank."""
    idle_ranks: float
    """Ranks without a clip."""
    frames: float
    """Real frames of a step, after augmentation."""
    seconds: float
    """The slowest rank by the cost model; slots under `FRAMES_ONLY`."""
    ideal_seconds: float
    """The same if every rank had the mean of real frames and every clip the mean length."""
    mixed: float
    """Share of clips that are mixed with another, which is read too."""

    @property
    def time_over_ideal(self) -> float:
        """Return the predicted step over the ideal one, by the cost model."""
        return self.seconds / self.ideal_seconds


def forecast(
    plan: Plan,
    *,
    size: int,
    world_size: int,
    budget: int,
    model: CostModel = FRAMES_ONLY,
    epochs: int = 1,
    steps: int = 0,
) -> Forecast:
    """Share global batches of `size` clips among `world_size` ranks, balanced by `model`, and average what they cost.

    `budget` as in `allot`; at most `steps` of each of `epochs` are measured (0: as many as take seconds).
    """
    rows, measured = [], 0
    limit = steps or max(1, min(max(_STEPS, _FEW_CLIPS // size), _MANY_CLIPS // size))
    # Whole windows: the steps of one are of all lengths together, and of one length each.
    limit = -(-limit // plan.shuffle_window) * plan.shuffle_window
    for batch in _batches(_sample(plan, limit * size), size, epochs, limit):
        rows.append(_measure(batch, plan.total_stride, world_size, budget, model))
        measured += 1
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return Forecast(
        world_size=world_size,
        batch_clips=min(size, plan.num_clips),
        steps_per_epoch=-(-plan.num_clips // size),
        steps_measured=measured,
        padding=1.0 - means["frames"] / means.pop("slots"),
        **means,
    )


def choose_window(
    plan: Plan,
    *,
    size: int,
    world_size: int,
    budget: int,
    model: CostModel,
    bar: float = MOST_OVER_IDEAL,
) -> int | None:
    """Return the smallest shuffle window whose predicted step is at most `bar` times the ideal one, or None.

    The window is part of the recipe, and the curve depends on it: this recommends one, a user takes it or not.
    """
    for window in SHUFFLE_WINDOWS:
        tried = dataclasses.replace(plan, shuffle_window=window)
        # Two windows: the mixture of lengths in one is not yet the corpus's.
        steps = max(2 * window, _SEARCH_STEPS)
        outcome = forecast(tried, size=size, world_size=world_size, budget=budget, model=model, steps=steps)
        if outcome.time_over_ideal <= bar:
            return window
    return None


def _sample(plan: Plan, clips: int) -> Plan:
    """Plan for at least `clips` clips drawn from very many, or for all clips of a corpus that is not that large."""
    drawn = max(clips, _ALL_CLIPS)
    if drawn >= plan.num_clips:
        return plan
    # With replacement: a clip drawn twice changes no mean.
    rows = generator(plan.seed, _SAMPLE).integers(0, plan.num_clips, drawn)
    return dataclasses.replace(
        plan, num_frames=plan.num_frames[rows], min_outputs=plan.min_outputs[rows], keys=plan.keys[rows]
    )


def _batches(plan: Plan, size: int, epochs: int, steps: int) -> Iterator[GlobalBatch]:
    """Yield the first full global batches of each epoch; the short one where there is no other."""
    # An epoch's last step has fewer clips a rank: it shares badly whatever the method, and is one of many.
    full = plan.num_clips // size
    for epoch in range(epochs):
        yield from islice(plan.batches(epoch, size), min(max(1, full), steps))


def _measure(batch: GlobalBatch, stride: int, world_size: int, budget: int, model: CostModel) -> dict[str, float]:
    slots, outputs = slot_frames(batch.num_frames, stride), -(-batch.num_frames // stride)
    sequential = model.sequential(outputs) if model.per_walk else None
    allotment = allot(slots, world_size=world_size, budget=budget, sequential=sequential)
    sums = np.concatenate([[0], np.cumsum(slots[allotment.clips])])
    held = sums[allotment.starts[1:]] - sums[allotment.starts[:-1]]
    cells, frames = allotment.cells_per_rank, int(batch.num_frames.sum())
    return {
        "cells_per_rank": cells,
        "imbalance": allotment.imbalance,
        "step_over_ideal": int(held.max()) * world_size / frames,
        "idle_ranks": int((held == 0).sum()),
        "frames": frames,
        "slots": int(slots.sum()),
        "seconds": _slowest(allotment, held, outputs, model),
        "ideal_seconds": float(model.seconds(frames / world_size, cells * outputs.mean(), cells)),
        "mixed": float((batch.partners != batch.clips).mean()),
    }


def _slowest(allotment: Allotment, held: Indices, outputs: Indices, model: CostModel) -> float:
    """Predict the slowest rank, which has `held` `[W]` slots in its cells, by the cost model."""
    cells = allotment.cells_per_rank
    if cells == 1 or not model.per_walk:
        # A rank's clips are longest first; one without clips walks one silent output frame.
        first = np.minimum(allotment.starts[:-1], len(outputs) - 1)
        walks = np.where(held > 0, outputs[allotment.clips[first]], 1)
        return float(model.seconds(held, walks, cells).max())
    ranks = np.argsort(-allotment.loads, kind="stable")[:_RANKS_CUT]
    return max(float(model.seconds(*share_counts(allotment, int(rank), outputs))) for rank in ranks)
