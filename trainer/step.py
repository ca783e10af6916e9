"""One optimizer step: this rank's passes, one all-reduce on what to do, one update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from trainer.data.batch import MicroBatch
from trainer.data.loader import StepShare
from trainer.engine import Engine, Update
from trainer.loss import StepLoss
from trainer.memory.exhaustion import is_exhaustion
from trainer.passes import Cell, Passes


class BrokenUpdateError(Exception):
    """An update that ran out of memory: some weights of this rank may have stepped and others not."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What all ranks know after a step; seconds are sums over ranks."""

    loss: float
    terms: dict[str, float]
    """The loss's terms by name, before they are weighted; empty where CTC is the loss."""
    grad_norm: float
    applied: bool
    overflowed: bool
    """Whether the step was skipped because its gradient was too large for fp16 at the loss scale."""
    stop_requested: bool
    wait_seconds: float
    seconds: float
    shortages: int
    """Times that memory ran out, on all ranks."""
    repeat: bool
    """Whether the step has to be made again: a rank could not finish it, and nothing of it was kept."""
    misfits: bool
    """Whether a rank has a clip that does not fit even alone."""
    suspects: tuple[int, ...]
    """Clips of this rank's micro-batches whose loss was not finite."""
    misfit: int | None
    """This rank's clip that does not fit, by its place in the global batch."""
    message: str
    """What this rank's library said when memory ran out last."""


def train_step(
    engine: Engine,
    share: StepShare,
    cells: Iterator[MicroBatch],
    *,
    reload: Callable[[Cell], MicroBatch],
    learning_rate: float,
    gradient_clip: float,
    loss: StepLoss,
    stop_requested: bool,
) -> StepOutcome:
    """Run one optimizer step of the global batch.

    The step is applied, skipped or repeated by all ranks together: what is not finite on one of them is skipped on all.
    Raises `BrokenPassError` or `BrokenUpdateError`, on this rank alone, where only a checkpoint is sound any more.
    """
    started = time.perf_counter()
    passes = Passes(engine, share, reload, loss)
    passes.run(cells)
    total, suspects = passes.losses()
    finite = math.isfinite(total)
    # The one fused all-reduce: what ranks must agree on, and the metrics of the step.
    agreed = engine.all_reduce(
        torch.tensor(
            [
                total if finite else 0.0,
                0.0 if finite else 1.0,
                float(stop_requested),
                passes.waited,
                time.perf_counter() - started,
                float(passes.shortages),
                float(passes.incomplete),
                float(passes.misfit is not None),
                *(passes.terms() if finite else [0.0] * len(loss.names)),
            ],
            dtype=torch.float64,
        )
    )
    loss_sum, not_finite, stops, wait_seconds, seconds, shortages, incomplete, misfits, *terms = agreed.tolist()
    if not_finite or incomplete or misfits:
        engine.discard()
        update = Update(grad_norm=math.nan, applied=False)
    else:
        update = _update(engine, learning_rate, gradient_clip)
    return StepOutcome(
        loss=loss_sum / share.denominator,
        terms={name: value / share.denominator for name, value in zip(loss.names, terms, strict=True)},
        grad_norm=update.grad_norm,
        applied=update.applied,
        overflowed=not update.applied and engine.loss_scale.is_dynamic and math.isinf(update.grad_norm),
        stop_requested=stops > 0,
        wait_seconds=wait_seconds,
        seconds=seconds,
        shortages=int(shortages),
        repeat=incomplete > 0 or misfits > 0,
        misfits=misfits > 0,
        suspects=suspects,
        misfit=passes.misfit,
        message=passes.message,
    )


def _update(engine: Engine, learning_rate: float, gradient_clip: float) -> Update:
    try:
        return engine.update(learning_rate, gradient_clip)
    except Exception as error:
        if not is_exhaustion(error):
            raise
        raise BrokenUpdateError(str(error).partition("\n")[0][:200]) from None
