"""Steps that were skipped: who is behind them, and when there are too many."""

from __future__ import annotations

from collections.abc import Callable

from trainer.checkpoint.content import RunState
from trainer.data.loader import StepShare, TrainingLoader
from trainer.engine import Engine
from trainer.errors import TrainingFailedError, name_some
from trainer.files import FencedFolder
from trainer.relief import Reload
from trainer.step import StepOutcome

NOT_FINITE = "not_finite.json"
_MOST_IN_A_ROW = 10


class Skips:
    """What a run says and counts about steps that were not applied, on all ranks alike."""

    def __init__(
        self, engine: Engine, loader: TrainingLoader, folder: FencedFolder, say: Callable[[str], None]
    ) -> None:
        self._engine, self._loader, self._folder, self._say = engine, loader, folder, say
        self._in_a_row = 0

    def note(self, share: StepShare, outcome: StepOutcome, state: RunState) -> None:
        """Take note of a step, applied or not; raises `TrainingFailedError` where going on is of no use."""
        if outcome.applied:
            self._in_a_row = 0
            return
        state.skipped_steps += 1
        if outcome.overflowed:
            self._report_overflow(share, state.step)
        else:
            self._report_not_finite(outcome, state.step)

    def _report_not_finite(self, outcome: StepOutcome, step: int) -> None:
        """Name the clips behind a gradient that is not finite; give up after too many in a row."""
        self._in_a_row += 1
        clips = self._loader.split
        suspects = [clips.id(i) for part in self._engine.gather_objects(outcome.suspects) for i in part]
        names = name_some(suspects) if suspects else "none alone has a loss that is not finite"
        self._say(f"step {step}: gradient not finite, skipped on all ranks; clips: {names}")
        if self._in_a_row >= _MOST_IN_A_ROW:
            self._engine.on_main(lambda: self._folder.write_json(NOT_FINITE, {"step": step, "clips": suspects}))
            raise TrainingFailedError(
                f"{self._in_a_row} steps in a row had a gradient that is not finite (clips of the last: {names}; "
                f"all in {self._folder.path / NOT_FINITE}); lower --learning_rate, or look at these clips"
            )

    def _report_overflow(self, share: StepShare, step: int) -> None:
        """Say that the loss scale was too large for a step; give up when there is none left that fits."""
        scale = self._engine.loss_scale
        self._say(f"step {step}: fp16 gradient overflowed, skipped; the loss scale is {scale.value:g}")
        if not scale.collapsed:
            return
        cell = share.allotment.cells(self._engine.rank)[0]
        with Reload(self._loader, share) as reload:
            where = self._engine.first_overflow(reload(cell))
        found = [name for name in self._engine.gather_objects(where) if name]
        place = f"the first overflow appears in {found[0]}" if found else "the forward pass does not overflow"
        raise TrainingFailedError(
            f"the fp16 loss scale collapsed (below 1): {place}; use --mixed_precision bf16 or no, or lower "
            "--learning_rate (the last checkpoint is sound)"
        )
