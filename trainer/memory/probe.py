"""The probe: the worst cells of the plan run forward and backward before training, to find what fits.

No optimizer step is made and no gradient left behind. Cells grow as long as memory is said to allow it, and shrink
where it runs out. Every rank makes the same passes, and what one of them cannot do is agreed on before the next pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.loader import TrainingLoader
from trainer.distillation import Distillation, Undistilled
from trainer.engine import Engine
from trainer.layout import slot_frames
from trainer.memory.accounting import (
    PeakMeter,
    capacity,
    spare_address_space,
)
from trainer.memory.activations import read_ahead
from trainer.memory.cells import load_of, random_cell, run_pass
from trainer.memory.exhaustion import free_memory, is_exhaustion
from trainer.memory.model import Load, MemoryModel, fit
from trainer.memory.worst import WorstCells
from trainer.passes import BrokenPassError

_MARGIN, _MARGIN_IN_STEP = 0.1, 0.2
"""Share of the capacity left free; more where a pass that runs out cannot be taken back."""
_GROWTH, _GROWTH_IN_STEP, _SHRINK = 2.0, 1.5, 0.75

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the probe, over all ranks."""

    slots: int
    padded: int
    clips: int
    fits: bool
    peak: int
    """Most bytes of any rank, beyond what was in use before; 0 where it did not fit."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What the probe found, the same on all ranks."""

    budget: int
    """Frames of a cell that fit on every rank."""
    fits: bool
    """False: not even the longest clip alone does."""
    model: MemoryModel
    """Bytes in use on the fullest rank at the peak of a pass, all that training adds included."""
    capacity: int | None
    """Bytes of the rank that has least; None: not known."""
    passes: tuple[Pass, ...]


def probe(
    engine: Engine,
    loader: TrainingLoader,
    worst: WorstCells,
    *,
    goal: int,
    states: int = 2,
    limit: Callable[[torch.device], int | None] = capacity,
    distillation: Distillation | Undistilled | None = None,
) -> ProbeResult:
    """Find the largest budget up to `goal` that fits on every rank.

    `states`: optimizer states per weight, which are made in the first step and must fit too. `limit`: what a rank may
    use. Raises `BrokenPassError` if memory runs out inside a pass of a backend that communicates there.
    """
    return _Probe(engine, loader, worst, states, limit, distillation).run(goal)


class _Probe:
    def __init__(
        self,
        engine: Engine,
        loader: TrainingLoader,
        worst: WorstCells,
        states: int,
        limit: Callable[[torch.device], int | None],
        distillation: Distillation | Undistilled | None,
    ) -> None:
        self._distillation = distillation
        self._engine, self._loader, self._worst = engine, loader, worst
        self._states, self._limit = states, limit
        in_step = engine.communicates_in_passes
        self._margin, self._growth = (_MARGIN_IN_STEP, _GROWTH_IN_STEP) if in_step else (_MARGIN, _GROWTH)
        self._passes: list[Pass] = []
        self._before = 0
        self._capacity: int | None = None

    def run(self, goal: int) -> ProbeResult:
        """Probe, and forget all gradients."""
        self._engine.training(True)
        spare_address_space()
        try:
            # Loads what a first pass loads. The gradient stays until the end: a step has one, after its first pass.
            self._attempt(np.array([self._loader.plan.total_stride], dtype=np.int64), counts=False)
            # A small one, which tells what a pass takes in any case from what its frames take.
            self._attempt(self._worst.most_clips(0))
            budget, fits = self._search(min(goal, self._worst.most))
        finally:
            self._engine.discard()
            free_memory()
        return ProbeResult(
            budget=goal if budget >= min(goal, self._worst.most) else budget,
            fits=fits,
            model=self._model(),
            capacity=self._capacity,
            passes=tuple(self._passes),
        )

    def _search(self, limit: int) -> tuple[int, bool]:
        floor = self._worst.floor
        target, best, ceiling = floor, 0, max(limit, floor)
        # Up, from the longest clip alone.
        while self._attempt(self._worst.largest(target)):
            best = target
            target = min(int(target * self._growth), ceiling, self._room(self._margin))
            if target <= best:
                break
        else:
            if not best:
                return floor, False
            ceiling = int(target * _SHRINK)
        # Down, to where each of the worst cells fits.
        budget = max(floor, min(ceiling, self._room(self._margin), max(best, int(target * _SHRINK))))
        while not all(self._attempt(cell) for cell in self._cells(budget)):
            if budget == floor:
                return floor, False
            budget = max(floor, int(budget * _SHRINK))
        if not all(one.fits for one in self._passes):
            # The edge was found by going over it, with no figure of the room left: training has cells of other shapes.
            budget = max(floor, int(budget * (1.0 - self._margin)))
        return budget, True

    def _cells(self, budget: int) -> list[Indices]:
        return [self._worst.largest(budget), self._worst.most_clips(budget), self._worst.alone()]

    def _room(self, margin: float) -> int:
        """Return the largest budget that the passes so far let expect to fit; without bounds if nobody knows."""
        if self._capacity is None:
            return 1 << 53
        return self._model().largest_budget(self._capacity, margin=margin, padding=self._worst.padding)

    def _model(self) -> MemoryModel:
        done = [one for one in self._passes if one.fits]
        if not done:
            return MemoryModel(fixed=float(self._before), per_slot=0.0, per_padded=0.0)
        fitted = fit([Load(slots=one.slots, padded=one.padded) for one in done], [one.peak for one in done])
        return dataclasses.replace(
            fitted, fixed=fitted.fixed + self._before, per_slot=fitted.per_slot + self._read_ahead()
        )

    def _read_ahead(self) -> float:
        """Return the bytes per slot of the cells that the loader holds beside the one in use."""
        split, cells = self._loader.split, self._loader.cell_loader
        stored = split.storage.dtype.itemsize
        return read_ahead(
            split.feature_dim,
            num_workers=cells.num_workers,
            on_cuda=cells.device.type == "cuda",
            # Frames are computed on as they are stored.
            itemsize=stored if split.is_video else 4,
            stored=stored,
        )

    def _attempt(self, num_frames: Indices, *, counts: bool = True) -> bool:
        """Make one pass on every rank; tell whether all of them could."""
        engine = self._engine
        meter = PeakMeter(engine.device)
        ran_out = self._pass(num_frames, meter)
        if ran_out:
            free_memory()
        room = self._limit(engine.device)
        before = meter.start + pending_states(engine, self._states)
        found = engine.gather_objects((ran_out, meter.beyond_start, before, room))
        fits = not any(one[0] for one in found)
        rooms = [one[3] for one in found if one[3] is not None]
        self._capacity = min(rooms) if rooms else None
        self._before = max(self._before, *(one[2] for one in found))
        if counts:
            load = load_of(num_frames, self._loader.plan.total_stride)
            peak = max(one[1] for one in found) if fits else 0
            self._passes.append(Pass(slots=load.slots, padded=load.padded, clips=len(num_frames), fits=fits, peak=peak))
        return fits

    def _pass(self, num_frames: Indices, meter: PeakMeter) -> bool:
        """Go forward and backward over random features; tell whether memory ran out."""
        loader = self._loader
        try:
            with meter:
                cell = random_cell(
                    num_frames,
                    total_stride=loader.plan.total_stride,
                    feature_dim=loader.split.feature_dim,
                    num_classes=len(loader.vocabulary),
                    device=self._engine.device,
                    mixed=loader.objective.mixup_alpha > 0,
                    frame_shape=loader.split.storage.frame_shape,
                )
                run_pass(self._engine, cell, loader.objective, distillation=self._distillation)
        except Exception as error:
            if not is_exhaustion(error):
                raise
            if self._engine.communicates_in_passes:
                slots = int(slot_frames(num_frames, loader.plan.total_stride).sum())
                raise BrokenPassError(f"{slots} frames in {len(num_frames)} clips") from None
            # The traceback holds the tensors of the pass; it goes with this frame.
            return True
        return False


def pending_states(engine: Engine, states: int) -> int:
    """Return the bytes of optimizer states that the first step will make on the engine's device."""
    optimizer: Any = getattr(engine, "optimizer", None) or engine._zero.optimizer  # type: ignore[attr-defined]
    missing = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                continue
            # A DTensor under FSDP2; naming its class would have every process import sympy, half a second of it.
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            missing += states * local.numel() * local.element_size() * (local.device.type == engine.device.type)
    return missing
