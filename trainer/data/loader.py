"""The loader: which cells this rank computes, planned ahead of their reading."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.allotment import Allotment, allot
from trainer.data.augment import NO_AUGMENTATION, Augmentation, draw_clip
from trainer.data.batch import Labels, MicroBatch, make_labels, without_features
from trainer.data.cells import CellLoader, CellPlan, CellStream
from trainer.data.cost import FRAMES_ONLY, CostModel
from trainer.data.normalization import Normalization
from trainer.data.plan import GlobalBatch, Plan
from trainer.data.prefetch import background, for_two_threads
from trainer.data.table import Split
from trainer.data.transform import ClipContent
from trainer.data.video.cells import VideoCellLoader
from trainer.data.video.view import View, central_view, draw_view
from trainer.data.vocabulary import Vocabulary
from trainer.layout import lay_out, slot_frames
from trainer.recipe import ObjectiveRecipe

Indices = npt.NDArray[np.int64]

_PLANNED_STEPS = 4
"""Steps whose allotment is worked out ahead, off the path of the training thread."""


@dataclass(frozen=True, kw_only=True)
class StepShare:
    """What every rank knows of an optimizer step before a feature is read.

    `denominator` is that of the whole global batch; `frames` its real frames, `slots` the frames computed on, `outputs`
    its output frames.
    """

    batch: GlobalBatch
    allotment: Allotment
    denominator: float
    frames: int
    slots: int
    outputs: int

    @property
    def per_frame(self) -> float:
        """Return what a sum over frames is multiplied by so that the step's one denominator makes it a mean."""
        return self.denominator / self.outputs


class TrainingLoader:
    """Cells of the training plan for one rank."""

    def __init__(
        self,
        *,
        split: Split,
        normalization: Normalization,
        plan: Plan,
        vocabulary: Vocabulary,
        objective: ObjectiveRecipe,
        num_workers: int,
        device: torch.device,
        cost_model: CostModel = FRAMES_ONLY,
    ) -> None:
        self.split = split
        self.plan = plan
        self.vocabulary = vocabulary
        self.objective = objective
        self.cost_model = cost_model
        self.cell_loader = _open_cells(
            split, normalization, noise=plan.augmentation.noise, num_workers=num_workers, device=device
        )

    def steps(
        self, epoch: int, position: int, *, size: int, rank: int, world_size: int, budget: int, drawn_size: int = 0
    ) -> Generator[tuple[StepShare, Iterator[MicroBatch]], None, None]:
        """Yield the steps of an epoch from `position` on, each with the iterator over this rank's cells.

        A cell is valid until the next one is asked for; the cells of a step must be used up before the next step is
        asked for. `drawn_size` as in `Plan.batches`.
        """
        batches = self.plan.batches(epoch, size, position, drawn_size)
        planned = (self.share(batch, world_size, budget) for batch in batches)
        ahead = background(planned, _PLANNED_STEPS) if self.cell_loader.num_workers else planned
        shares, upcoming = for_two_threads(ahead)
        requests = ((share, cell) for share in upcoming for cell in share.allotment.cells(rank))
        cells = self.cell_loader.cells(requests, lambda request: self._plan_cell(request[0].batch, request[1]))
        try:
            for share in shares:
                yield share, itertools.islice(cells, share.allotment.cells_per_rank)
        finally:
            cells.close()
            ahead.close()

    def cell(self, batch: GlobalBatch, cell: Indices) -> contextlib.AbstractContextManager[MicroBatch]:
        """Read any clips of a global batch as a cell, at once; they are given by their places in it."""
        return self.cell_loader.cell(self._plan_cell(batch, cell))

    def share(self, batch: GlobalBatch, world_size: int, budget: int) -> StepShare:
        """Work out who does what of a global batch, and the denominator of its sums."""
        slots = slot_frames(batch.num_frames, self.plan.total_stride)
        outputs = -(-batch.num_frames // self.plan.total_stride)
        weights, partner_weights = self.weights(batch)
        # Summed over the whole global batch, on every rank alike: a mean needs no communication.
        denominator = float(len(batch))
        if self.objective.loss_normalization == "target":
            lengths = self.split.num_glosses
            denominator = float(weights @ lengths[batch.clips] + partner_weights @ lengths[batch.partners])
        return StepShare(
            batch=batch,
            allotment=allot(
                slots,
                world_size=world_size,
                budget=budget,
                sequential=self.cost_model.sequential(outputs) if self.cost_model.per_walk else None,
            ),
            denominator=denominator,
            frames=int(batch.num_frames.sum()),
            slots=int(slots.sum()),
            outputs=int(outputs.sum()),
        )

    def weights(self, batch: GlobalBatch) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the weight of each clip's loss, and of its loss against the partner's glosses, `[n]` each."""
        weights, partner_weights = batch.shares, 1.0 - batch.shares
        if self.objective.loss_normalization == "clip_target":
            weights = weights / self.split.num_glosses[batch.clips]
            partner_weights = partner_weights / self.split.num_glosses[batch.partners]
        return weights, partner_weights

    def _plan_cell(self, batch: GlobalBatch, cell: Indices) -> CellPlan:
        if not len(cell):
            return idle_cell(self.plan.total_stride)
        clips, partners, num_frames = batch.clips[cell], batch.partners[cell], batch.num_frames[cell]
        weights, partner_weights = self.weights(batch)
        mixed = np.flatnonzero(partners != clips)
        starts = np.cumsum(num_frames) - num_frames
        contents = self._contents(batch.epoch, clips, starts, 0)
        for place, partner in enumerate(self._contents(batch.epoch, partners[mixed], starts[mixed], len(clips))):
            index = int(mixed[place])
            contents[index] = ClipContent(
                **{**vars(contents[index]), "share": float(batch.shares[cell][index]), "partner": partner}
            )
        return CellPlan(
            clips=np.concatenate([clips, partners[mixed]]),
            contents=contents,
            batch=without_features(
                layout=lay_out(num_frames, self.plan.total_stride, self.plan.dropout_keys(batch.epoch, clips)),
                labels=self._labels(clips, weights[cell]),
                partner_labels=self._labels(partners, partner_weights[cell]) if len(mixed) else None,
                clips=tuple(clips.tolist()),
            ),
        )

    def _contents(self, epoch: int, clips: Indices, starts: Indices, first: int) -> list[ClipContent]:
        """Say what becomes of clips that are read as the `first` of the cell and those after it."""
        lengths, strengths = self.plan.lengths(epoch, clips), self.plan.augmentation
        # Keys of a cell without augmentation would be derived for nothing.
        keys = self.plan.augment_keys(epoch, clips).tolist() if strengths != NO_AUGMENTATION else [None] * len(clips)
        return [
            ClipContent(
                stored=first + place,
                start=int(starts[place]),
                num_frames=int(lengths.kept[place]),
                **self._drawn(
                    key,
                    num_frames=int(self.split.num_frames[clip]),
                    rescaled=int(lengths.rescaled[place]),
                    kept=int(lengths.kept[place]),
                ),
            )
            for place, (clip, key) in enumerate(zip(clips, keys, strict=True))
        ]

    def _drawn(self, key: int | None, *, num_frames: int, rescaled: int, kept: int) -> dict[str, Any]:
        """Draw what augmentation makes of a clip; without a key, none."""
        split, strengths = self.split, self.plan.augmentation
        if split.is_video:
            sizes = {"frame_size": split.storage.frame_size, "crop_size": split.storage.crop_size}
            if key is None:
                return {"view": central_view(num_frames, **sizes)}
            view = draw_view(key, num_frames=num_frames, rescaled=rescaled, kept=kept, strengths=strengths, **sizes)
            return {"view": view}
        if key is None:
            return {}
        draw = draw_clip(
            key,
            num_frames=num_frames,
            dim=split.feature_dim,
            rescaled=rescaled,
            kept=kept,
            strengths=strengths,
        )
        return {"draw": draw}

    def _labels(self, clips: Indices, weights: npt.NDArray[np.float64]) -> Labels:
        classes = [self.vocabulary.encode(self.split.glosses(int(clip))) for clip in clips]
        return make_labels([np.array(part, dtype=np.int64) for part in classes], weights)


class EvaluationLoader:
    """Cells of one split for evaluation: every clip on exactly one rank, shared by cost."""

    def __init__(
        self,
        *,
        split: Split,
        normalization: Normalization,
        vocabulary: Vocabulary,
        total_stride: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self.split = split
        self.vocabulary = vocabulary
        self.total_stride = total_stride
        self.num_frames = split.num_frames.astype(np.int64)
        self.cell_loader = _open_cells(split, normalization, num_workers=num_workers, device=device)
        self._feasible = split.feasible(total_stride)

    def cells(self, *, rank: int, world_size: int, budget: int) -> Generator[MicroBatch, None, None]:
        """Yield this rank's cells, as many as on every other rank; stand-ins make up for those without clips.

        A cell is valid until the next one is asked for.
        """
        allotment = allot(slot_frames(self.num_frames, self.total_stride), world_size=world_size, budget=budget)
        with contextlib.closing(self.cell_loader.cells(allotment.cells(rank), self._plan_cell)) as cells:
            yield from cells
        self.cell_loader.pool.clear()

    def cell(self, clips: Indices) -> contextlib.AbstractContextManager[MicroBatch]:
        """Read any clips of the split as a cell, at once."""
        return self.cell_loader.cell(self._plan_cell(clips))

    def _plan_cell(self, cell: Indices) -> CellPlan:
        if not len(cell):
            return idle_cell(self.total_stride)
        num_frames = self.num_frames[cell]
        glosses = [self.split.glosses(int(index)) for index in cell]
        # CTC has no loss for a gloss without a class, nor for too few frames: such clips count in the WER alone.
        has_loss = [
            bool(self._feasible[index]) and not self.vocabulary.unknown(signed)
            for index, signed in zip(cell, glosses, strict=True)
        ]
        classes = [
            np.array(self.vocabulary.encode(signed) if ok else [1], dtype=np.int64)
            for signed, ok in zip(glosses, has_loss, strict=True)
        ]
        starts = np.cumsum(num_frames) - num_frames
        return CellPlan(
            clips=cell,
            contents=[
                ClipContent(
                    stored=place,
                    start=int(starts[place]),
                    num_frames=int(num_frames[place]),
                    view=self._view(int(num_frames[place])),
                )
                for place in range(len(cell))
            ],
            batch=without_features(
                layout=lay_out(num_frames, self.total_stride),
                labels=make_labels(classes, np.array(has_loss, dtype=np.float64)),
                partner_labels=None,
                clips=tuple(cell.tolist()),
            ),
            verify=True,
        )

    def _view(self, num_frames: int) -> View | None:
        storage = self.split.storage
        if not self.split.is_video:
            return None
        return central_view(num_frames, frame_size=storage.frame_size, crop_size=storage.crop_size)


def _open_cells(
    split: Split, normalization: Normalization, *, noise: float = 0.0, num_workers: int, device: torch.device
) -> CellStream:
    if split.is_video:
        return VideoCellLoader(split, device=device, num_workers=num_workers)
    return CellLoader(split, normalization, noise=noise, num_workers=num_workers, device=device)


def idle_cell(total_stride: int) -> CellPlan:
    """Plan the stand-in for a cell without clips: it costs one output frame and weighs nothing."""
    return CellPlan(
        clips=np.empty(0, dtype=np.int64),
        contents=[ClipContent(stored=0, start=0, num_frames=total_stride)],
        batch=without_features(
            layout=lay_out(np.array([total_stride]), total_stride, np.zeros(1, dtype=np.uint64)),
            labels=make_labels([np.ones(1, dtype=np.int64)], np.zeros(1)),
            partner_labels=None,
            clips=(),
        ),
    )


def make_plan(
    split: Split,
    *,
    total_stride: int,
    seed: int,
    augmentation: Augmentation,
    mixup_alpha: float,
    shuffle_window: int = 1,
) -> Plan:
    """Build the plan of a run over the training clips."""
    return Plan(
        num_frames=split.num_frames,
        min_outputs=split.min_outputs,
        keys=split.keys,
        total_stride=total_stride,
        seed=seed,
        augmentation=augmentation,
        mixup_alpha=mixup_alpha,
        shuffle_window=shuffle_window,
    )
