"""Evaluation of a split: every clip decoded exactly once on any number of ranks, counts summed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch

from trainer.data.batch import MicroBatch
from trainer.data.loader import EvaluationLoader
from trainer.engine import Engine
from trainer.errors import InputError
from trainer.memory.exhaustion import free_memory, is_exhaustion
from trainer.objectives.ctc import ctc_losses, float32_log_probs
from trainer.passes import BrokenPassError
from trainer.scoring.beam import BeamSearch
from trainer.scoring.decoding import Emission, best_path
from trainer.scoring.protocols import Protocol, score
from trainer.scoring.wer import WerCounts


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of a split; `loss` is the mean over `loss_clips` clips of CTC loss per gloss, NaN if none has one."""

    counts: WerCounts
    loss: float
    loss_clips: int
    blank_rate: float
    emissions: dict[int, list[Emission]] = field(default_factory=dict)
    """Decoded classes of each clip by its index in the split; of this rank's clips alone."""

    def metrics(self, prefix: str) -> dict[str, Any]:
        """Name the figures for the log; the last four expose a collapsed model."""
        return {
            f"{prefix}/loss": self.loss,
            f"{prefix}/wer": self.counts.wer,
            f"{prefix}/blank_rate": self.blank_rate,
            f"{prefix}/empty_share": self.counts.empty_share,
            f"{prefix}/deletions_share": self.counts.deletions_share,
            f"{prefix}/mean_hypothesis_length": self.counts.mean_hypothesis_length,
        }


@overload
def evaluate(
    engine: Engine, loader: EvaluationLoader, *, budget: int, protocol: Protocol, beam: BeamSearch | None = None
) -> Evaluation: ...


@overload
def evaluate(
    engine: Engine,
    loader: EvaluationLoader,
    *,
    budget: int,
    protocol: Protocol,
    beam: BeamSearch | None = None,
    stop_requested: Callable[[], bool],
) -> Evaluation | None: ...


def evaluate(
    engine: Engine,
    loader: EvaluationLoader,
    *,
    budget: int,
    protocol: Protocol,
    beam: BeamSearch | None = None,
    stop_requested: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Evaluate a split with the engine's model; `budget` in frames bounds a micro-batch.

    Clips are decoded by the best path, or by `beam` where there is one.

    Counts are int64 sums over clips, in one reduction that also proves the coverage: each clip once. Returns None on
    all ranks if `stop_requested` became true on one of them, after the cell at hand. Raises `AssertionError` if a clip
    was missed or counted twice, `InputError` if a beam is to decode what is not a number.
    """
    engine.training(False)
    clips = loader.split
    seen = torch.zeros(len(clips), dtype=torch.int64)
    counts = WerCounts.zero()
    frames, blanks, losses = 0, 0, _LossSum()
    emissions: dict[int, list[Emission]] = {}
    with (
        torch.no_grad(),
        contextlib.closing(loader.cells(rank=engine.rank, world_size=engine.world_size, budget=budget)) as cells,
    ):
        # Every rank has as many cells as every other, so that all of them ask at the same places.
        for cell in cells:
            if stop_requested is not None and engine.all_reduce(torch.tensor([int(stop_requested())])).item():
                engine.training(True)
                return None
            for part in _decode(engine, loader, cell, with_log_probs=beam is not None):
                if not part.cell.clips:
                    # A stand-in: its pass kept the ranks in step, where passes communicate.
                    continue
                losses.add(part.losses)
                for place, (index, labels) in enumerate(zip(part.cell.clips, part.labels, strict=True)):
                    seen[index] += 1
                    frames += len(labels)
                    blanks += int((labels == 0).sum())
                    if beam is None:
                        emissions[index] = list(best_path(labels))
                    else:
                        emissions[index] = _search(beam, part.log_probs[place], clips.id(index))
                references = [clips.glosses(index) for index in part.cell.clips]
                hypotheses = [
                    loader.vocabulary.decode(emission.label for emission in emissions[index])
                    for index in part.cell.clips
                ]
                counts = counts + score(references, hypotheses, protocol)
    engine.training(True)
    sums = [frames, blanks, losses.clips, losses.not_finite, losses.total]
    vector = torch.tensor([*counts.as_vector(), *sums, *seen.tolist()], dtype=torch.int64)
    engine.all_reduce(vector)
    width = len(counts.as_vector())
    frames, blanks, loss_clips, not_finite, loss_total = vector[width : width + len(sums)].tolist()
    if not bool((vector[width + len(sums) :] == 1).all()):
        raise AssertionError("an evaluation must count each clip exactly once")
    return Evaluation(
        counts=WerCounts.from_vector(vector[:width].tolist()),
        loss=loss_total * _LossSum.UNIT / loss_clips if loss_clips and not not_finite else float("nan"),
        loss_clips=loss_clips,
        blank_rate=blanks / max(1, frames),
        emissions=emissions,
    )


class _LossSum:
    """A sum of losses in fixed point: an integer like the counts, the same in any order and on any number of ranks."""

    UNIT = 2.0**-24

    def __init__(self) -> None:
        self.clips = self.not_finite = self.total = 0

    def add(self, losses: torch.Tensor) -> None:
        """Add the losses of clips that have one, in nats."""
        finite = losses[torch.isfinite(losses)]
        self.clips += len(losses)
        self.not_finite += len(losses) - len(finite)
        self.total += int((finite / self.UNIT).round().long().sum())


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """The best class of each frame, clip by clip, and the losses per gloss of the clips that have one."""

    cell: MicroBatch
    labels: list[np.ndarray]
    losses: torch.Tensor
    log_probs: list[np.ndarray]
    """`[T, V]` of each clip, where they were asked for."""


def _search(beam: BeamSearch, log_probs: np.ndarray, clip_id: str) -> list[Emission]:
    try:
        return beam(log_probs)
    except ValueError as error:
        problem = InputError(
            f"clip {clip_id}: the model's {error}; evaluate with --mixed_precision no, or another checkpoint"
        )
        problem.local = True
        raise problem from error


def _decode(engine: Engine, loader: EvaluationLoader, cell: MicroBatch, *, with_log_probs: bool) -> Iterator[_Decoded]:
    """Decode a cell, in halves where memory runs out."""
    decoded = _try_cell(engine, cell, with_log_probs=with_log_probs)
    if decoded is not None:
        yield decoded
        return
    free_memory()
    if engine.communicates_in_passes or len(cell.clips) < 2:
        raise BrokenPassError(f"{cell.layout.length} frames in {len(cell.clips)} clips of {loader.split.name}")
    half = len(cell.clips) // 2
    for clips in (cell.clips[:half], cell.clips[half:]):
        with loader.cell(np.array(clips)) as smaller:
            yield from _decode(engine, loader, smaller, with_log_probs=with_log_probs)


def _try_cell(engine: Engine, cell: MicroBatch, *, with_log_probs: bool) -> _Decoded | None:
    """Decode a cell; None if memory ran out."""
    try:
        logits = engine.forward(cell.features, cell.layout).logits
        log_probs = float32_log_probs(logits)
        losses = ctc_losses(log_probs, cell.layout.output_lengths, cell.labels).cpu().double()
        best = logits.argmax(dim=-1).cpu().numpy()
        kept = log_probs.cpu().numpy() if with_log_probs else np.empty((len(best), 0), np.float32)
    except Exception as error:
        if not is_exhaustion(error):
            raise
        return None
    has_loss = cell.labels.weights.cpu() > 0
    ends = np.cumsum(cell.layout.output_lengths)[:-1]
    return _Decoded(
        cell=cell,
        labels=np.split(best, ends),
        log_probs=np.split(kept, ends),
        losses=(losses / cell.labels.lengths)[has_loss],
    )
