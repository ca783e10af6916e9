"""One optimizer step: this rank's cells forward and backward, then one all-reduce on what to do."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.data.batch import MicroBatch
from trainer.data.loader import StepShare
from trainer.engine import Engine, Update
from trainer.objectives.ctc import ctc_objective


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What all ranks know after a step; seconds are sums over ranks."""

    loss: float
    grad_norm: float
    applied: bool
    stop_requested: bool
    wait_seconds: float
    seconds: float
    suspects: tuple[int, ...]
    """Clips of this rank's micro-batches whose loss was not finite."""


def train_step(
    engine: Engine,
    share: StepShare,
    cells: Iterator[MicroBatch],
    *,
    learning_rate: float,
    gradient_clip: float,
    label_smoothing: float,
    stop_requested: bool,
) -> StepOutcome:
    """Run one optimizer step of the global batch.

    The step is applied or skipped by all ranks together: what is not finite on one of them is skipped on all.
    """
    started = time.perf_counter()
    waited = 0.0
    losses: list[torch.Tensor] = []
    clips: list[tuple[int, ...]] = []
    last = share.allotment.cells_per_rank - 1
    for number in range(last + 1):
        asked = time.perf_counter()
        cell = next(cells)
        waited += time.perf_counter() - asked
        logits = engine.forward(cell.features, cell.layout)
        loss_sum = ctc_objective(logits, cell.layout.output_lengths, cell.labels, cell.partner_labels, label_smoothing)
        engine.backward(loss_sum, share.denominator, is_last=number == last)
        # Left on the device: asking for the number would wait for the pass to end, and the next one would begin late.
        losses.append(loss_sum.detach())
        clips.append(cell.clips)
    values = torch.stack(losses).double().cpu()
    total = values.sum()
    suspects = [clip for value, part in zip(values, clips, strict=True) if not torch.isfinite(value) for clip in part]
    finite = bool(torch.isfinite(total))
    # The one fused all-reduce: what ranks must agree on, and the metrics of the step.
    agreed = engine.all_reduce(
        torch.tensor(
            [
                float(total) if finite else 0.0,
                0.0 if finite else 1.0,
                float(stop_requested),
                waited,
                time.perf_counter() - started,
            ],
            dtype=torch.float64,
        )
    )
    loss_sum_all, not_finite, stops, wait_seconds, seconds = agreed.tolist()
    if not_finite:
        engine.discard()
        update = Update(grad_norm=math.nan, applied=False)
    else:
        update = engine.update(learning_rate, gradient_clip)
    return StepOutcome(
        loss=loss_sum_all / share.denominator,
        grad_norm=update.grad_norm,
        applied=update.applied,
        stop_requested=stops > 0,
        wait_seconds=wait_seconds,
        seconds=seconds,
        suspects=tuple(suspects),
    )
