"""This rank's passes of a step, and their relief where memory runs out.

Where passes need no other rank, a cell that does not fit is halved and done again: what it added to the gradient is
forgotten together with what this rank had before it, since a backward pass that broke off has added some of its part.
The one place where that cannot be undone is the last backward pass, while its gradient is already on its way to the
other ranks: then all of them discard the step and repeat it, with smaller cells.

Where passes communicate, all ranks make the same passes, and a pass that breaks off inside leaves the others waiting:
the run starts again from the newest checkpoint, with cells of half the size for all. Asking before each pass whether it
will fit would cost a word of all ranks on every pass, and know no more than the probe did when it set the budget.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.batch import MicroBatch
from trainer.data.loader import StepShare
from trainer.engine import Engine
from trainer.loss import StepLoss
from trainer.memory.exhaustion import free_memory, is_exhaustion

Cell = npt.NDArray[np.int64]

_FORWARD, _BACKWARD = "forward", "backward"


class BrokenPassError(Exception):
    """A pass that other ranks take part in ran out of memory: no rank can go on with this step."""


@dataclass
class Passes:
    """What this rank's passes of one step came to."""

    engine: Engine
    share: StepShare
    reload: Callable[[Cell], MicroBatch]
    """Reads a cell again, given its places in the global batch; valid until the next call."""
    loss: StepLoss

    def __post_init__(self) -> None:
        self.waited = 0.0
        self.shortages = 0
        """Times that memory ran out."""
        self.incomplete = False
        """Whether the last pass broke off while its gradient was on its way."""
        self.message = ""
        """What was said when it ran out last."""
        self.misfit: int | None = None
        """Place in the global batch of a clip that does not fit even alone."""
        self._loader_ended = False
        self._losses: list[Tensor] = []
        self._terms: list[dict[str, Tensor]] = []
        self._clips: list[tuple[int, ...]] = []

    def run(self, cells: Iterator[MicroBatch]) -> None:
        """Make all passes of this rank's cells, which `cells` yields in the order of the allotment."""
        own = self.share.allotment.cells(self.engine.rank)
        if self.engine.communicates_in_passes:
            self._run_in_step(deque(own), cells)
        else:
            self._run_freely(deque((cell, True) for cell in own), cells)
        self.engine.end_passes()

    def losses(self) -> tuple[float, tuple[int, ...]]:
        """Return the sum of the losses and the clips of micro-batches whose loss is not finite."""
        if not self._losses:
            return 0.0, ()
        values = torch.stack(self._losses).double().cpu()
        suspects = [
            clip for value, part in zip(values, self._clips, strict=True) if not torch.isfinite(value) for clip in part
        ]
        return float(values.sum()), tuple(suspects)

    def terms(self) -> list[float]:
        """Return the sum of each of the loss's named terms, before it is weighted, in the order of their names."""
        parts = [[terms[name] for terms in self._terms if name in terms] for name in self.loss.names]
        return [float(torch.stack(part).double().sum()) if part else 0.0 for part in parts]

    def _run_freely(self, todo: deque[tuple[Cell, bool]], cells: Iterator[MicroBatch]) -> None:
        done: list[Cell] = []
        while todo:
            cell, is_first_try = todo.popleft()
            broke = self._pass(self._load(cell, cells if is_first_try else None), is_last=not todo)
            if broke is None:
                done.append(cell)
                continue
            self.shortages += 1
            free_memory()
            halves = halve(cell, self.share.allotment.costs)
            if broke == _BACKWARD and not todo and self.engine.sends_in_last_pass:
                self.incomplete = True
                self.misfit = int(cell[0]) if len(halves) == 1 else None
                return
            if len(halves) == 1 and not is_first_try:
                self.misfit = int(cell[0])
                return
            if broke == _BACKWARD:
                self.engine.forget_passes()
                self._losses.clear()
                self._terms.clear()
                self._clips.clear()
                halves, done = [*done, *halves], []
            todo.extendleft((half, False) for half in reversed(halves))

    def _run_in_step(self, own: deque[Cell], cells: Iterator[MicroBatch]) -> None:
        while own:
            batch = self._load(own.popleft(), cells)
            if self._pass(batch, is_last=not own) is not None:
                raise BrokenPassError(f"{batch.layout.length} frames in {len(batch.clips)} clips")

    def _load(self, cell: Cell, cells: Iterator[MicroBatch] | None) -> MicroBatch:
        asked = time.perf_counter()
        try:
            batch = self.reload(cell) if cells is None or self._loader_ended else next(cells)
        except Exception as error:
            if not is_exhaustion(error) or cells is None or self._loader_ended:
                raise
            # On a GPU cells are brought there ahead of time. What failed so ends the loader: the rest of the step is
            # read cell by cell, and the lower budget makes the run open another one.
            self._loader_ended = True
            self.shortages += 1
            batch = None
        if batch is None:
            free_memory()
            batch = self.reload(cell)
        self.waited += time.perf_counter() - asked
        return batch

    def _pass(self, cell: MicroBatch, *, is_last: bool) -> str | None:
        """Go forward and backward; return where memory ran out, if it did."""
        stage = _FORWARD
        try:
            # First, so that the teacher's activations are gone when the student's come.
            targets = self.loss.distillation.targets(cell)
            outputs = self.engine.forward(cell.features, cell.layout)
            loss = self.loss(outputs, cell, targets, per_frame=self.share.per_frame)
            stage = _BACKWARD
            self.engine.backward(loss.total, self.share.denominator, is_last=is_last)
        except Exception as error:
            if not is_exhaustion(error):
                raise
            # The traceback holds the tensors of the pass; it goes with this frame's exception.
            self.message = str(error).partition("\n")[0][:200]
            return stage
        # Left on the device: asking for the number would wait for the pass to end, and the next one would begin late.
        self._losses.append(loss.total.detach())
        self._terms.append(loss.terms)
        self._clips.append(cell.clips)
        return None


def halve(cell: Cell, costs: npt.NDArray[np.int64]) -> list[Cell]:
    """Cut a cell into two of near-equal cost; a single clip stays as it is."""
    if len(cell) < 2:
        return [cell]
    sums = np.cumsum(costs[cell])
    cut = int(np.searchsorted(sums, sums[-1] / 2)) + 1
    cut = min(max(cut, 1), len(cell) - 1)
    return [cell[:cut], cell[cut:]]
