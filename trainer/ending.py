"""Why a run ends, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.checkpoint.content import RunState
from trainer.distillation import Distillation, Undistilled
from trainer.exits import Outcome
from trainer.recipe import RunRecipe


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Why an attempt at a run leaves."""

    reason: str
    stopped: bool = False
    """Whether the run is not at its end, and goes on with the next attempt."""


def finished(state: RunState, run: RunRecipe) -> bool:
    """Tell whether all steps are done."""
    return state.epoch >= run.epochs or bool(run.max_steps and state.step >= run.max_steps)


def goal_ending(state: RunState, run: RunRecipe) -> Ending | None:
    """Return why the last validation ends the run, if it does."""
    if run.target_wer is not None and state.best_wer is not None and state.best_wer <= run.target_wer:
        return Ending(reason=f"reached the target WER of {run.target_wer} %")
    if run.early_stopping_patience and state.validations_since_best >= run.early_stopping_patience:
        return Ending(reason=f"no better {run.selection_metric} in {state.validations_since_best} validations")
    return None


def natural_ending(state: RunState, run: RunRecipe) -> Ending | None:
    """Return why the run is at its end, if it is."""
    if finished(state, run):
        return Ending(reason="finished")
    return goal_ending(state, run) if state.last_validation == state.step > 0 else None


def summarize(ending: Ending, state: RunState, run: RunRecipe, distillation: Distillation | Undistilled) -> str:
    """Say in a line how the run ended and what came of it."""
    best = ""
    if state.best is not None and state.best_wer is not None and state.first_wer is not None:
        best = (
            f"; dev WER {state.first_wer:.2f} % before, {state.best_wer:.2f} % at best; best "
            f"{run.selection_metric} {state.best:.4g} at step {state.best_step}"
        )
    if ending.stopped:
        return f"{ending.reason} at step {state.step}{best}; go on with --resume auto ({run.output_dir})"
    missed = f"; target WER {run.target_wer} % NOT reached" if _missed_target(state, run) else ""
    verdict = distillation.verdict(state.best_wer)
    return f"{ending.reason} at step {state.step}{best}{missed}{verdict} ({run.output_dir})"


def outcome_of(ending: Ending, state: RunState, run: RunRecipe, *, saved_step: int, said: str) -> Outcome:
    """Return the exit code, 1 where the recipe names a target WER that was not reached, with what a job is told."""
    if ending.stopped:
        return Outcome(0, said, step=saved_step, word="RESUME")
    return Outcome(int(_missed_target(state, run)), said, step=saved_step)


def _missed_target(state: RunState, run: RunRecipe) -> bool:
    return run.target_wer is not None and (state.best_wer is None or state.best_wer > run.target_wer)
