"""The loader: this rank's cells, read and augmented ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.allotment import Allotment, allot
from trainer.data.augment import Augmentation, augment, resample
from trainer.data.batch import Labels, MicroBatch, make_labels
from trainer.data.corpus import Clip, min_output_frames
from trainer.data.features import read_features
from trainer.data.normalization import Normalization
from trainer.data.plan import GlobalBatch, Plan
from trainer.data.prefetch import prefetch
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError
from trainer.layout import lay_out, slot_frames
from trainer.randomness import clip_keys
from trainer.recipe import ObjectiveRecipe

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StepShare:
    """What every rank knows of an optimizer step before a feature is read.

    `denominator` is that of the whole global batch; `frames` its real frames, `slots` the frames computed on.
    """

    batch: GlobalBatch
    allotment: Allotment
    denominator: float
    frames: int
    slots: int


class ClipReader:
    """Read clips of one split as normalised features."""

    def __init__(self, clips: Sequence[Clip], normalization: Normalization) -> None:
        self.clips = clips
        self.normalization = normalization

    def read(self, index: int, *, check_finite: bool = False) -> npt.NDArray[np.float32]:
        """Return the features `[T, D]` of a clip; raises `InputError` that names its file."""
        clip = self.clips[index]
        expected = (clip.num_frames, self.normalization.feature_dim)
        try:
            features = read_features(clip.source, check_finite=check_finite)
            if features.shape != expected:
                raise InputError(
                    f"{clip.source}: holds {list(features.shape)} values, {list(expected)} when the run began; do not "
                    "replace features during a run"
                )
        except InputError as error:
            # The rank that has the clip is the only one to know.
            error.local = True
            raise
        return self.normalization.apply(features)


class TrainingLoader:
    """Cells of the training plan for one rank."""

    def __init__(
        self,
        *,
        reader: ClipReader,
        plan: Plan,
        vocabulary: Vocabulary,
        objective: ObjectiveRecipe,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.reader = reader
        self.plan = plan
        self.objective = objective
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.classes = [np.array(vocabulary.encode(clip.glosses), dtype=np.int64) for clip in reader.clips]
        self.num_glosses = np.array([len(classes) for classes in self.classes], dtype=np.int64)

    def steps(
        self, epoch: int, position: int, *, size: int, rank: int, world_size: int, budget: int, drawn_size: int = 0
    ) -> Generator[tuple[StepShare, Iterator[MicroBatch]], None, None]:
        """Yield the steps of an epoch from `position` on, each with the iterator over this rank's cells.

        The cells of a step must be used up before the next step is asked for; `drawn_size` as in `Plan.batches`.
        """
        batches = self.plan.batches(epoch, size, position, drawn_size)
        shares, ahead = itertools.tee(self.share(batch, world_size, budget) for batch in batches)
        requests = ((share, cell) for share in ahead for cell in share.allotment.cells(rank))
        lengths = self.plan.lengths(epoch)
        keys, seeds = self.plan.augment_keys(epoch), self.plan.dropout_keys(epoch)

        def read(clip: int) -> npt.NDArray[np.float32]:
            return augment(
                self.reader.read(clip),
                int(keys[clip]),
                rescaled=int(lengths.rescaled[clip]),
                kept=int(lengths.kept[clip]),
                strengths=self.plan.augmentation,
            )

        def load(request: tuple[StepShare, Indices]) -> MicroBatch:
            share, cell = request
            return self._assemble(share.batch, cell, read, seeds)

        cells = prefetch(requests, load, self.num_workers)
        try:
            for share in shares:
                yield share, itertools.islice(cells, share.allotment.cells_per_rank)
        finally:
            cells.close()

    def share(self, batch: GlobalBatch, world_size: int, budget: int) -> StepShare:
        """Work out who does what of a global batch, and the denominator of its sums."""
        slots = slot_frames(batch.num_frames, self.plan.total_stride)
        weights, partner_weights = self.weights(batch)
        # Summed over the whole global batch, on every rank alike: a mean needs no communication.
        denominator = float(len(batch))
        if self.objective.loss_normalization == "target":
            lengths = self.num_glosses
            denominator = float(weights @ lengths[batch.clips] + partner_weights @ lengths[batch.partners])
        return StepShare(
            batch=batch,
            allotment=allot(slots, world_size=world_size, budget=budget),
            denominator=denominator,
            frames=int(batch.num_frames.sum()),
            slots=int(slots.sum()),
        )

    def weights(self, batch: GlobalBatch) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the weight of each clip's loss, and of its loss against the partner's glosses, `[n]` each."""
        weights, partner_weights = batch.shares, 1.0 - batch.shares
        if self.objective.loss_normalization == "clip_target":
            weights = weights / self.num_glosses[batch.clips]
            partner_weights = partner_weights / self.num_glosses[batch.partners]
        return weights, partner_weights

    def _assemble(
        self,
        batch: GlobalBatch,
        cell: Indices,
        read: Callable[[int], npt.NDArray[np.float32]],
        seeds: npt.NDArray[np.uint64],
    ) -> MicroBatch:
        if not len(cell):
            return self._idle()
        clips, partners = batch.clips[cell], batch.partners[cell]
        num_frames = batch.num_frames[cell]
        features = self._buffer(int(num_frames.sum()))
        rows = features.numpy()
        for end, clip, partner, share in zip(np.cumsum(num_frames), clips, partners, batch.shares[cell], strict=True):
            content = read(int(clip))
            if partner != clip:
                content = share * content + (1.0 - share) * resample(read(int(partner)), len(content))
            rows[end - len(content) : end] = content
        weights, partner_weights = self.weights(batch)
        mixed = bool(np.any(partners != clips))
        return MicroBatch(
            features=features,
            layout=lay_out(num_frames, self.plan.total_stride, seeds[clips]),
            labels=self._labels(clips, weights[cell]),
            partner_labels=self._labels(partners, partner_weights[cell]) if mixed else None,
            clips=tuple(int(clip) for clip in clips),
        )

    def _idle(self) -> MicroBatch:
        """Build the stand-in for a cell without clips: it costs one output frame and weighs nothing."""
        stride = self.plan.total_stride
        return MicroBatch(
            features=self._buffer(stride).zero_(),
            layout=lay_out(np.array([stride]), stride, np.zeros(1, dtype=np.uint64)),
            labels=make_labels([np.ones(1, dtype=np.int64)], np.zeros(1)),
            partner_labels=None,
            clips=(),
        )

    def _labels(self, clips: Indices, weights: npt.NDArray[np.float64]) -> Labels:
        return make_labels([self.classes[clip] for clip in clips], weights)

    def _buffer(self, num_frames: int) -> Tensor:
        dim = self.reader.normalization.feature_dim
        return torch.empty(num_frames, dim, dtype=torch.float32, pin_memory=self.pin_memory)


class EvaluationLoader:
    """Cells of one split for evaluation: every clip on exactly one rank, shared by cost."""

    def __init__(
        self,
        *,
        reader: ClipReader,
        vocabulary: Vocabulary,
        total_stride: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.reader = reader
        self.vocabulary = vocabulary
        self.total_stride = total_stride
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.num_frames = np.array([clip.num_frames for clip in reader.clips], dtype=np.int64)

    def cells(self, *, rank: int, world_size: int, budget: int) -> Generator[MicroBatch | None, None, None]:
        """Yield this rank's cells, as many as on every other rank; None stands for a cell without clips."""
        allotment = allot(slot_frames(self.num_frames, self.total_stride), world_size=world_size, budget=budget)
        return prefetch(allotment.cells(rank), self._assemble, self.num_workers)

    def _assemble(self, cell: Indices) -> MicroBatch | None:
        if not len(cell):
            return None
        num_frames = self.num_frames[cell]
        dim = self.reader.normalization.feature_dim
        features = torch.empty(int(num_frames.sum()), dim, pin_memory=self.pin_memory)
        for end, index in zip(np.cumsum(num_frames), cell, strict=True):
            content = self.reader.read(int(index), check_finite=True)
            features.numpy()[end - len(content) : end] = content
        clips = [self.reader.clips[index] for index in cell]
        # CTC has no loss for a gloss without a class, nor for too few frames: such clips count in the WER alone.
        has_loss = [
            not self.vocabulary.unknown(clip.glosses)
            and -(-clip.num_frames // self.total_stride) >= min_output_frames(clip.glosses)
            for clip in clips
        ]
        classes = [
            np.array(self.vocabulary.encode(clip.glosses) if ok else [1], dtype=np.int64)
            for clip, ok in zip(clips, has_loss, strict=True)
        ]
        return MicroBatch(
            features=features,
            layout=lay_out(num_frames, self.total_stride),
            labels=make_labels(classes, np.array(has_loss, dtype=np.float64)),
            partner_labels=None,
            clips=tuple(int(index) for index in cell),
        )


def make_plan(
    clips: Sequence[Clip],
    *,
    total_stride: int,
    seed: int,
    augmentation: Augmentation,
    mixup_alpha: float,
    shuffle_window: int = 1,
) -> Plan:
    """Build the plan of a run over the training clips."""
    return Plan(
        num_frames=np.array([clip.num_frames for clip in clips], dtype=np.int64),
        min_outputs=np.array([min_output_frames(clip.glosses) for clip in clips], dtype=np.int64),
        keys=clip_keys([clip.id for clip in clips]),
        total_stride=total_stride,
        seed=seed,
        augmentation=augmentation,
        mixup_alpha=mixup_alpha,
        shuffle_window=shuffle_window,
    )
