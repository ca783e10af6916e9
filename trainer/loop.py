"""The loop: the run as a sequence of steps, validations and checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainer.checkpoint.content import Checkpoint, RunState
from trainer.checkpoint.store import CheckpointStore
from trainer.data.batch import MicroBatch
from trainer.data.cost import COST_MODEL, CostFitter, heaviest_share
from trainer.data.loader import EvaluationLoader, StepShare, TrainingLoader
from trainer.data.prepare import TrainingCorpus
from trainer.distillation import Distillation, Undistilled
from trainer.engine import Engine
from trainer.engine.engine import count_graphs
from trainer.errors import TrainingFailedError, name_some
from trainer.files import write_json
from trainer.layout import slot_frames
from trainer.loss import StepLoss
from trainer.memory.budget import FrameBudget
from trainer.memory.probe import choose_budget
from trainer.observe.progress import Progress
from trainer.observe.red_flags import find_red_flags
from trainer.observe.trackers import Tracker
from trainer.optimization import learning_rate
from trainer.passes import BrokenPassError
from trainer.recipe import Recipe
from trainer.relief import Relief, Reload
from trainer.signals import StopRequest
from trainer.step import BrokenUpdateError, StepOutcome, train_step
from trainer.validation import Evaluation, evaluate

_MOST_SKIPS_IN_A_ROW = 10
_STOPPED = "stopped"
_STOPPED_ON_REQUEST = f"{_STOPPED} on request"


@dataclass(kw_only=True)
class TrainingRun:
    """One attempt at a run, from its state to the end or to a request to stop."""

    recipe: Recipe
    engine: Engine
    corpus: TrainingCorpus
    state: RunState
    loader: TrainingLoader
    dev: EvaluationLoader
    train_subset: EvaluationLoader | None
    store: CheckpointStore
    trackers: Sequence[Tracker]
    progress: Progress
    stop: StopRequest
    relief: Relief
    distillation: Distillation | Undistilled

    def __post_init__(self) -> None:
        run = self.recipe.run
        self.batch_size = self.recipe.global_batch_size(self.engine.world_size)
        self.peak = self.recipe.peak_learning_rate(self.engine.world_size)
        self.num_clips = self.loader.plan.num_clips
        longest = slot_frames(np.array([self.loader.plan.num_frames.max()]), self.loader.plan.total_stride)[0]
        budget = choose_budget(
            self.engine,
            self.loader,
            recipe=self.recipe,
            run_dir=Path(run.output_dir),
            say=self.progress.say,
            distillation=self.distillation,
        )
        self.memory = FrameBudget(budget, int(longest))
        steps_per_epoch = -(-self.num_clips // self.batch_size)
        self.total_steps = min(run.epochs * steps_per_epoch, run.max_steps or run.epochs * steps_per_epoch)
        whole, rest = divmod(self.total_steps, steps_per_epoch)
        self.total_epochs = whole + min(1.0, rest * self.batch_size / self.num_clips)
        self.first_step = self.state.step
        self.skips_in_a_row = 0
        self.costs = CostFitter()

    def run(self) -> int:
        """Train to the end; return the exit code: 0, or 1 where the recipe names a target WER that was not reached."""
        self.progress.start(total=self.total_steps, done=self.state.step)
        reason = self._begin() or self._end_reason() or self._train()
        if self.recipe.run.compile:
            self.progress.say(f"torch.compile made {count_graphs()} graphs for the model's blocks")
        self.progress.say(self._summary(reason))
        target = self.recipe.run.target_wer
        reached = target is None or (self.state.best_wer is not None and self.state.best_wer <= target)
        return 0 if reached or reason.startswith(_STOPPED) else 1

    def _begin(self) -> str | None:
        """Validate before the first step, or where the last attempt left a validation undone."""
        if self._validation_due():
            return self._validate_and_save()
        if self.state.step == 0 and self.state.last_validation < 0:
            # The figure to beat; and a dev split that cannot be evaluated shows before training time is spent.
            metrics = self._validate()
            if metrics is None:
                return _STOPPED_ON_REQUEST
            self._log(metrics)
        return None

    def _train(self) -> str:
        """Take steps until there is a reason not to; return it."""
        while True:
            if self.state.position == 0:
                self.state.drawn_size = self.batch_size
            steps = self.loader.steps(
                self.state.epoch,
                self.state.position,
                size=self.batch_size,
                rank=self.engine.rank,
                world_size=self.engine.world_size,
                budget=self.memory.value,
                drawn_size=self.state.drawn_size,
            )
            try:
                reason = self._train_epoch(steps)
            finally:
                steps.close()
            if reason:
                return reason

    def _train_epoch(self, steps: Iterator[tuple[StepShare, Iterator[MicroBatch]]]) -> str | None:
        started = time.perf_counter()
        budget = self.memory.value
        for share, cells in steps:
            outcome, rate = self._step(share, cells)
            self._count(share, outcome, rate, time.perf_counter() - started)
            reason = self._boundary(outcome)
            if reason:
                return reason
            if self.memory.value != budget:
                # What was planned ahead was cut for another budget.
                return None
            started = time.perf_counter()
        return None

    def _step(self, share: StepShare, cells: Iterator[MicroBatch]) -> tuple[StepOutcome, float]:
        end = self.state.position + len(share.batch)
        rate = learning_rate(
            self.state.epoch + end / self.num_clips,
            total_epochs=self.total_epochs,
            peak=self.peak,
            recipe=self.recipe.optimization,
        )
        outcome = self._attempt(share, cells, rate)
        self.state.step += 1
        self.state.position = end
        if end >= self.num_clips:
            self.state.epoch, self.state.position = self.state.epoch + 1, 0
        if outcome.applied:
            self.skips_in_a_row = 0
        elif outcome.overflowed:
            self._report_overflow(share)
        else:
            self._report_skip(outcome)
        return outcome, rate

    def _attempt(self, share: StepShare, cells: Iterator[MicroBatch], rate: float) -> StepOutcome:
        """Make a step, again with smaller cells where a rank could not finish it; the plan's clips stay the same."""
        while True:
            with Reload(self.loader, share) as reload:
                try:
                    outcome = train_step(
                        self.engine,
                        share,
                        cells,
                        reload=reload,
                        learning_rate=rate,
                        gradient_clip=self.recipe.optimization.gradient_clip,
                        loss=StepLoss(objective=self.recipe.objective, distillation=self.distillation),
                        stop_requested=self.stop.requested,
                    )
                except BrokenPassError as error:
                    self.relief.descend_alone(
                        self.memory, f"a pass of {error} ran out of memory on rank {self.engine.rank}"
                    )
                except BrokenUpdateError as error:
                    self.relief.descend_from_update(self.memory, str(error))
                if outcome.shortages:
                    self.relief.note_shortage(self.memory, share, outcome.shortages, self.state)
                elif not outcome.repeat:
                    self.memory.rise()
                if outcome.misfits:
                    self._save(is_best=False)
                    self.relief.descend_together(self.memory, self._name_misfits(share, outcome))
                if not outcome.repeat:
                    return outcome
                share = self.loader.share(share.batch, self.engine.world_size, self.memory.value)
                cells = map(reload, share.allotment.cells(self.engine.rank))

    def _name_misfits(self, share: StepShare, outcome: StepOutcome) -> str:
        split, mine = self.loader.split, None
        if outcome.misfit is not None:
            clip = int(share.batch.clips[outcome.misfit])
            mine = f"{split.id(clip)} ({split.num_frames[clip]} frames; {outcome.message})"
        names = [name for name in self.engine.gather_objects(mine) if name is not None]
        return f"clip {name_some(names)} does not fit into memory, not even alone"

    def _count(self, share: StepShare, outcome: StepOutcome, rate: float, seconds: float) -> None:
        """Add a step to the sums that the next line of metrics is made of; a skipped step counts in time alone."""
        window = self.state.window
        sums = {
            "seconds": seconds,
            "rank_seconds": outcome.seconds,
            "wait_seconds": outcome.wait_seconds,
            "frames": float(share.frames),
            "slots": float(share.slots),
            "all_steps": 1.0,
            "imbalance": share.allotment.imbalance,
        }
        if outcome.applied:
            sums |= {"steps": 1.0, "loss": outcome.loss, "grad_norm": outcome.grad_norm}
            sums |= {f"train/{name}": value for name, value in outcome.terms.items()}
        for name, value in sums.items():
            window[name] = window.get(name, 0.0) + value
        window["lr"] = rate
        if self.engine.is_main:
            outputs = -(-share.batch.num_frames // self.loader.plan.total_stride)
            computing = seconds - outcome.wait_seconds / self.engine.world_size
            self.costs.add(*heaviest_share(share.allotment, outputs), computing)
        self.progress.advance(outcome.loss)

    def _boundary(self, outcome: StepOutcome) -> str | None:
        """Log, validate and save where due; return why the run ends here, if it does."""
        run, step = self.recipe.run, self.state.step
        reason = self._end_reason() or self._stop_reason(outcome)
        if self._validation_due():
            if reason is not None and reason.startswith(_STOPPED):
                # Whoever asked may not wait for a validation: the next attempt begins with it.
                self._save(is_best=False)
                return reason
            return self._validate_and_save() or reason
        if step % run.log_every == 0:
            self._log({})
        if reason or (run.save_every and step % run.save_every == 0):
            self._save(is_best=False)
        return reason

    def _validation_due(self) -> bool:
        state, every = self.state, self.recipe.run.evaluate_every
        if state.step == 0 or state.last_validation == state.step:
            return False
        return self._is_finished() or (state.step % every == 0 if every else state.position == 0)

    def _validate_and_save(self) -> str | None:
        """Validate, log and save; return why the run ends after it, if it does."""
        metrics = self._validate()
        if metrics is None:
            self._save(is_best=False)
            return _STOPPED_ON_REQUEST
        self._log(metrics)
        self._save(is_best=self.state.best_step == self.state.step)
        return self._enough()

    def _is_finished(self) -> bool:
        run = self.recipe.run
        return self.state.epoch >= run.epochs or bool(run.max_steps and self.state.step >= run.max_steps)

    def _end_reason(self) -> str | None:
        if self._is_finished():
            return "finished"
        return self._enough() if self.state.last_validation == self.state.step > 0 else None

    def _stop_reason(self, outcome: StepOutcome) -> str | None:
        limit = self.recipe.run.stop_after_steps
        if outcome.stop_requested:
            return _STOPPED_ON_REQUEST
        if limit and self.state.step - self.first_step >= limit:
            return f"{_STOPPED} after {limit} steps, as --stop_after_steps says"
        return None

    def _enough(self) -> str | None:
        """Say why the last validation ends the run, if it does."""
        run, state = self.recipe.run, self.state
        if run.target_wer is not None and state.best_wer is not None and state.best_wer <= run.target_wer:
            return f"reached the target WER of {run.target_wer} %"
        if run.early_stopping_patience and state.validations_since_best >= run.early_stopping_patience:
            return f"no better {run.selection_metric} in {state.validations_since_best} validations"
        return None

    def _validate(self) -> dict[str, Any] | None:
        """Evaluate the dev split and the fixed training subset; keep the best and the patience. None: asked to stop."""
        result = self._evaluate(self.dev)
        subset = self._evaluate(self.train_subset) if result and self.train_subset else None
        if result is None or (self.train_subset and subset is None):
            return None
        metrics = result.metrics("val")
        if subset is not None:
            metrics["train/wer"] = subset.counts.wer
        state = self.state
        state.last_validation = state.step
        if state.step == 0:
            state.first_wer = result.counts.wer
            return metrics
        state.best_wer = min(result.counts.wer, math.inf if state.best_wer is None else state.best_wer)
        state.validations_since_best += 1
        value = result.counts.wer if self.recipe.run.selection_metric == "wer" else result.loss
        if math.isfinite(value) and (state.best is None or value < state.best):
            state.best, state.best_step, state.validations_since_best = value, state.step, 0
        for flag in find_red_flags(metrics, epoch=state.epoch, warmup_epochs=self.recipe.optimization.warmup_epochs):
            self.progress.say(flag)
        return metrics

    def _evaluate(self, loader: EvaluationLoader) -> Evaluation | None:
        try:
            return evaluate(
                self.engine,
                loader,
                budget=self.memory.value,
                protocol=self.recipe.run.protocol,
                stop_requested=lambda: self.stop.requested,
            )
        except BrokenPassError as error:
            self.relief.descend_alone(self.memory, f"a validation pass of {error} ran out of memory")

    def _log(self, extra: dict[str, Any]) -> None:
        """Write one line: the means since the last one, and `extra`."""
        window = self.state.window
        metrics: dict[str, Any] = {"step": self.state.step, "epoch": self.state.epoch}
        if window:
            applied = window.get("steps", 0.0)
            metrics |= {
                "train/loss": window["loss"] / applied if applied else None,
                "train/grad_norm": window["grad_norm"] / applied if applied else None,
                "lr": window["lr"],
                "frames_per_second": window["frames"] / window["seconds"],
                "padding_fraction": 1.0 - window["frames"] / window["slots"],
                "rank_imbalance": window["imbalance"] / window["all_steps"],
                "data_wait_fraction": window["wait_seconds"] / window["rank_seconds"],
                "skipped_steps": self.state.skipped_steps,
            }
            metrics |= {name: value / applied for name, value in window.items() if name.startswith("train/")}
        metrics |= extra
        self.state.window = {}
        for tracker in self.trackers:
            tracker.log(metrics)
        self.progress.show(metrics)

    def _save(self, *, is_best: bool) -> None:
        # All ranks give their parts; what is written, rank 0 writes.
        model, optimizer = self.engine.full_state()
        self.state.loss_scale = self.engine.loss_scale.state()
        self.engine.on_main(lambda: self._publish(model, optimizer, is_best))

    def _publish(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], is_best: bool) -> None:
        fitted = self.costs.fit()
        if fitted is not None:
            write_json(Path(self.recipe.run.output_dir) / COST_MODEL, fitted.to_json())
        self.store.publish(
            Checkpoint(
                recipe=self.recipe,
                vocabulary=self.corpus.vocabulary,
                normalization=self.corpus.normalization,
                state=self.state,
                model=model,
                optimizer=optimizer,
            ),
            is_best=is_best,
        )

    def _report_skip(self, outcome: StepOutcome) -> None:
        """Name the clips behind a gradient that is not finite; give up after too many in a row."""
        self.state.skipped_steps += 1
        self.skips_in_a_row += 1
        clips = self.loader.split
        suspects = [clips.id(i) for part in self.engine.gather_objects(outcome.suspects) for i in part]
        names = name_some(suspects) if suspects else "none alone has a loss that is not finite"
        self.progress.say(f"step {self.state.step}: gradient not finite, skipped on all ranks; clips: {names}")
        if self.skips_in_a_row >= _MOST_SKIPS_IN_A_ROW:
            path = Path(self.recipe.run.output_dir) / "not_finite.json"
            self.engine.on_main(lambda: path.write_text(json.dumps({"step": self.state.step, "clips": suspects})))
            raise TrainingFailedError(
                f"{self.skips_in_a_row} steps in a row had a gradient that is not finite (clips of the last: {names}; "
                f"all in {path}); lower --learning_rate, or look at these clips"
            )

    def _report_overflow(self, share: StepShare) -> None:
        """Say that the loss scale was too large for a step; give up when there is none left that fits."""
        self.state.skipped_steps += 1
        scale = self.engine.loss_scale
        self.progress.say(
            f"step {self.state.step}: fp16 gradient overflowed, skipped; the loss scale is {scale.value:g}"
        )
        if not scale.collapsed:
            return
        cell = share.allotment.cells(self.engine.rank)[0]
        with Reload(self.loader, share) as reload:
            where = self.engine.first_overflow(reload(cell))
        found = [name for name in self.engine.gather_objects(where) if name]
        place = f"the first overflow appears in {found[0]}" if found else "the forward pass does not overflow"
        raise TrainingFailedError(
            f"the fp16 loss scale collapsed (below 1): {place}; use --mixed_precision bf16 or no, or lower "
            "--learning_rate (the last checkpoint is sound)"
        )

    def _summary(self, reason: str) -> str:
        state, run = self.state, self.recipe.run
        best = ""
        if state.best is not None and state.best_wer is not None and state.first_wer is not None:
            best = (
                f"; dev WER {state.first_wer:.2f} % before, {state.best_wer:.2f} % at best; best "
                f"{run.selection_metric} {state.best:.4g} at step {state.best_step}"
            )
        goal = ""
        if run.target_wer is not None and not reason.startswith(("reached", _STOPPED)):
            goal = f"; target WER {run.target_wer} % NOT reached"
        if not reason.startswith(_STOPPED):
            goal += self.distillation.verdict(state.best_wer)
        go_on = "; go on with --resume auto" if reason.startswith(_STOPPED) else ""
        return f"{reason} at step {state.step}{best}{goal}{go_on} ({run.output_dir})"
