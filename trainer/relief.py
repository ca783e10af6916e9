"""Relief from memory that ran out: the budget lowered, an event in the log, or the run started again one rung lower."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from trainer.checkpoint.content import RunState
from trainer.data.batch import MicroBatch
from trainer.data.loader import StepShare, TrainingLoader
from trainer.engine import Engine
from trainer.errors import TrainingFailedError
from trainer.files import FencedFolder
from trainer.memory.budget import FrameBudget
from trainer.memory.exhaustion import memory_figures
from trainer.memory.ladder import CHECKPOINTING, SMALLER_BUDGET, Descent, Rung, Watch, next_rung, rungs_taken
from trainer.observe.trackers import Tracker
from trainer.passes import Cell
from trainer.recipe import Recipe

EVENTS = "relief.json"
_TRIED = "every way to need less memory was tried"
_OPTIONS = (
    "cut long clips (--max_frames), leave it out aloud (--skip_clips ID), or take a GPU with more memory; " + _TRIED
)
_OPTIONS_OF_UPDATES = "use more ranks, a smaller model (--width, --rnn_size), or hardware with more memory; " + _TRIED


class Relief:
    """What a run does about memory, on all ranks alike."""

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        folder: FencedFolder,
        trackers: Sequence[Tracker],
        say: Callable[[str], None],
    ) -> None:
        """Go on below the rungs that this launch has come down already, and log the last one."""
        self._engine, self._recipe, self._folder, self._trackers, self._say = engine, recipe, folder, trackers, say
        self._taken = rungs_taken()
        self._watch = Watch(engine.world_size)
        if self._taken and engine.is_main:
            rung = self._taken[-1]
            say(f"started again: {rung.reason}; now with {rung.name} ({engine.name})")
            self._record({"event": "started_again", "rung": rung.name, "reason": rung.reason}, step=0, epoch=0)

    def note_shortage(self, memory: FrameBudget, share: StepShare, shortages: int, state: RunState) -> None:
        """Lower the budget after a step in which memory ran out; the step itself was made all the same."""
        before = memory.value
        memory.lower(int(share.allotment.loads.max()), shortages)
        self._say(
            f"step {state.step}: memory ran out {shortages} time(s), cells were halved; the budget goes from {before} "
            f"to {memory.value} frames"
        )
        if self._engine.is_main:
            event = {"event": "out_of_memory", "shortages": shortages, "budget": memory.value}
            self._record(event, step=state.step, epoch=state.epoch)

    def descend_together(self, memory: FrameBudget, reason: str) -> NoReturn:
        """End this attempt on all ranks, to start again one rung lower; all of them know the reason."""
        # A single clip is what did not fit: a smaller budget does not cut it.
        raise Descent(self._next(memory, reason, without=(SMALLER_BUDGET,)))

    def descend_alone(self, memory: FrameBudget, reason: str) -> NoReturn:
        """Start all ranks again from the newest checkpoint: they wait for this one, and cannot be asked."""
        self._announce(memory, reason)

    def descend_from_update(self, memory: FrameBudget, message: str) -> NoReturn:
        """Do the same where the optimizer ran out of memory, which passes that need less would not help."""
        reason = f"the optimizer ran out of memory on rank {self._engine.rank} ({message})"
        self._announce(memory, reason, without=(SMALLER_BUDGET, CHECKPOINTING), options=_OPTIONS_OF_UPDATES)

    def close(self) -> None:
        """Stop listening to other ranks."""
        self._watch.close()

    def _announce(
        self, memory: FrameBudget, reason: str, *, without: tuple[str, ...] = (), options: str = _OPTIONS
    ) -> NoReturn:
        try:
            rung = self._next(memory, reason, without=without, options=options)
        except TrainingFailedError as error:
            error.local = True
            raise
        self._watch.announce(rung)

    def _next(self, memory: FrameBudget, reason: str, *, without: tuple[str, ...], options: str = _OPTIONS) -> Rung:
        rung = next_rung(
            backend=self._engine.rung,
            activation_checkpointing=self._recipe.run.activation_checkpointing,
            world_size=self._engine.world_size,
            budget=memory.value,
            floor=memory.floor,
            taken=[*(rung.name for rung in self._taken), *without],
        )
        if rung is None:
            raise TrainingFailedError(f"{reason}; {options}")
        return Rung(name=rung.name, flags=rung.flags, environment=rung.environment, reason=reason)

    def _record(self, event: dict[str, Any], *, step: int, epoch: int) -> None:
        """Write an event with the memory's figures to the log and to the run directory."""
        line = {"step": step, "epoch": epoch, **event, **memory_figures(self._engine.device)}
        for tracker in self._trackers:
            tracker.log(line)
        path = self._folder.path / EVENTS
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self._folder.write_json(EVENTS, [*earlier, line])


class Reload:
    """Reads cells of a step again, one at a time; the buffer of the last one goes back before the next is read."""

    def __init__(self, loader: TrainingLoader, share: StepShare) -> None:
        self._loader, self._share = loader, share
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Reload:
        return self

    def __call__(self, cell: Cell) -> MicroBatch:
        self._held.close()
        return self._held.enter_context(self._loader.cell(self._share.batch, cell))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.close()
