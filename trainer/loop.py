"""The loop: the run as a sequence of steps, validations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from trainer.ending import Ending, finished, goal_ending, natural_ending, outcome_of, summarize
from trainer.engine import Engine
from trainer.engine.engine import count_graphs
from trainer.errors import name_some
from trainer.exits import Outcome
from trainer.files import FencedFolder
from trainer.layout import slot_frames
from trainer.loss import StepLoss
from trainer.memory.budget import FrameBudget
from trainer.memory.choice import choose_budget
from trainer.observe.progress import Progress
from trainer.observe.red_flags import find_red_flags
from trainer.observe.trackers import Tracker
from trainer.observe.window import add_step, means
from trainer.optimization import learning_rate
from trainer.passes import BrokenPassError
from trainer.recipe import Recipe
from trainer.relief import Relief, Reload
from trainer.signals import StopRequest
from trainer.skips import Skips
from trainer.step import BrokenUpdateError, StepOutcome, train_step
from trainer.validation import Evaluation, evaluate


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
    folder: FencedFolder

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
            folder=self.folder,
            say=self.progress.say,
            distillation=self.distillation,
        )
        self.memory = FrameBudget(budget, int(longest))
        steps_per_epoch = -(-self.num_clips // self.batch_size)
        self.total_steps = min(run.epochs * steps_per_epoch, run.max_steps or run.epochs * steps_per_epoch)
        whole, rest = divmod(self.total_steps, steps_per_epoch)
        self.total_epochs = whole + min(1.0, rest * self.batch_size / self.num_clips)
        self.first_step = self.state.step
        self.saved_step = self.state.step
        self.skips = Skips(self.engine, self.loader, self.folder, self.progress.say)
        self.costs = CostFitter()

    def run(self) -> Outcome:
        """Train to the end; return the exit code: 0, or 1 where the recipe names a target WER that was not reached."""
        self.progress.start(total=self.total_steps, done=self.state.step)
        ending = self._begin() or natural_ending(self.state, self.recipe.run) or self._train()
        if self.recipe.run.compile:
            self.progress.say(f"torch.compile made {count_graphs()} graphs for the model's blocks")
        said = summarize(ending, self.state, self.recipe.run, self.distillation)
        self.progress.say(said)
        return outcome_of(ending, self.state, self.recipe.run, saved_step=self.saved_step, said=said)

    def _begin(self) -> Ending | None:
        """Validate before the first step, or where the last attempt left a validation undone."""
        if self._validation_due():
            return self._validate_and_save()
        if self.state.step == 0 and self.state.last_validation < 0:
            # The figure to beat; and a dev split that cannot be evaluated shows before training time is spent.
            metrics = self._validate()
            if metrics is None:
                return self._stopped()
            self._log(metrics)
        return None

    def _train(self) -> Ending:
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
                ending = self._train_epoch(steps)
            finally:
                steps.close()
            if ending:
                return ending

    def _train_epoch(self, steps: Iterator[tuple[StepShare, Iterator[MicroBatch]]]) -> Ending | None:
        started = time.perf_counter()
        budget = self.memory.value
        for share, cells in steps:
            outcome, rate = self._step(share, cells)
            self._count(share, outcome, rate, time.perf_counter() - started)
            ending = self._boundary(outcome)
            if ending:
                return ending
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
        self.skips.note(share, outcome, self.state)
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
        """Take note of a step: in the next line of metrics, the time watch and the cost model."""
        add_step(
            self.state.window,
            share,
            outcome,
            learning_rate=rate,
            seconds=seconds,
        )
        self.stop.time.note_step(seconds)
        if self.engine.is_main:
            outputs = -(-share.batch.num_frames // self.loader.plan.total_stride)
            computing = seconds - outcome.wait_seconds / self.engine.world_size
            self.costs.add(*heaviest_share(share.allotment, outputs), computing)
        self.progress.advance(outcome.loss)

    def _boundary(self, outcome: StepOutcome) -> Ending | None:
        """Log, validate and save where due; return why the run ends here, if it does."""
        run, step = self.recipe.run, self.state.step
        ending = natural_ending(self.state, run) or self._stop_ending(outcome)
        if self._validation_due():
            if ending is not None and ending.stopped:
                # Whoever asked may not wait for a validation: the next attempt begins with it.
                self._save(is_best=False)
                return ending
            return self._validate_and_save() or ending
        if step % run.log_every == 0:
            self._log({})
        if ending or (run.save_every and step % run.save_every == 0):
            self._save(is_best=False)
        return ending

    def _validation_due(self) -> bool:
        state, every = self.state, self.recipe.run.evaluate_every
        if state.step == 0 or state.last_validation == state.step:
            return False
        return finished(state, self.recipe.run) or (state.step % every == 0 if every else state.position == 0)

    def _validate_and_save(self) -> Ending | None:
        """Validate, log and save; return why the run ends after it, if it does."""
        metrics = self._validate()
        if metrics is None:
            self._save(is_best=False)
            return self._stopped()
        self._log(metrics)
        self._save(is_best=self.state.best_step == self.state.step)
        return goal_ending(self.state, self.recipe.run)

    def _stopped(self) -> Ending:
        return Ending(reason=f"stopped {self.stop.reason}", stopped=True)

    def _stop_ending(self, outcome: StepOutcome) -> Ending | None:
        limit = self.recipe.run.stop_after_steps
        if outcome.stop_requested:
            return self._stopped()
        if limit and self.state.step - self.first_step >= limit:
            return Ending(reason=f"stopped after {limit} steps, as --stop_after_steps says", stopped=True)
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
        metrics: dict[str, Any] = {"step": self.state.step, "epoch": self.state.epoch, **means(self.state.window)}
        if self.state.window:
            metrics["skipped_steps"] = self.state.skipped_steps
        metrics |= extra
        self.state.window = {}
        for tracker in self.trackers:
            tracker.log(metrics)
        self.progress.show(metrics)

    def _save(self, *, is_best: bool) -> None:
        started = time.perf_counter()
        # All ranks give their parts; what is written, rank 0 writes.
        model, optimizer = self.engine.full_state()
        self.state.loss_scale = self.engine.loss_scale.state()
        self.engine.on_main(lambda: self._publish(model, optimizer, is_best))
        self.saved_step = self.state.step
        self.stop.time.note_save(time.perf_counter() - started)

    def _publish(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], is_best: bool) -> None:
        fitted = self.costs.fit()
        if fitted is not None:
            self.folder.write_json(COST_MODEL, fitted.to_json())
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
