"""Teachers: a whole model that is asked in every pass, or the soft targets that one has left."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.content import Checkpoint, read_checkpoint
from trainer.checkpoint.store import find_checkpoint
from trainer.checkpoint.trained import restore_trained
from trainer.data.batch import MicroBatch
from trainer.data.loader import EvaluationLoader
from trainer.data.normalization import Normalization
from trainer.data.prepare import TrainingCorpus
from trainer.data.table import Split
from trainer.distillation import RECORD, Answer, Distillation, Undistilled, ask
from trainer.distillation_checks import alike, check_input, check_strides, check_vocabulary
from trainer.engine import Engine
from trainer.engine.replicated import ReplicatedEngine
from trainer.errors import InputError, TrainingFailedError, name_some
from trainer.layout import slot_frames
from trainer.observe.progress import Progress
from trainer.passes import BrokenPassError
from trainer.recipe import Recipe
from trainer.softtargets.store import SoftTargets, checkpoint_fingerprint, stand_in
from trainer.validation import evaluate

_CLIPS_PER_CELL = 8


class OnlineTeacher:
    """A teacher that is asked in every pass: a whole model on each rank, outside the student's backend."""

    def __init__(self, folder: Path, engine: Engine, recipe: Recipe) -> None:
        """Read a checkpoint, every byte of it compared with its manifest, and build the model that it names."""
        self.where, self.fingerprint = str(folder), checkpoint_fingerprint(folder)
        self.checkpoint: Checkpoint = read_checkpoint(folder, with_optimizer=False)
        self.normalization: Normalization = self.checkpoint.normalization
        self.total_stride: int = self.checkpoint.recipe.model.total_stride
        self.wer: float | None = None
        self.protocol: str = recipe.run.protocol
        self._student_stride = recipe.model.total_stride
        self._reveals_features = recipe.distillation.feature_weight > 0
        run = dataclasses.replace(
            recipe.run,
            mixed_precision=recipe.distillation.teacher_precision,
            compile=False,
            activation_checkpointing=False,
        )
        # An engine of its own, without an optimizer: no backend wraps, shards or saves the teacher.
        self.engine = ReplicatedEngine(engine.processes, run)

    @property
    def num_features(self) -> int | None:
        """Return the size of what the classifier sees, where the student's is compared with it."""
        model = self.checkpoint.recipe.model
        return 2 * int(model.rnn_size or 0) if self._reveals_features else None

    def answer(self, cell: MicroBatch, *, made_up: bool = False) -> Answer:
        """Return what the teacher says of the clips as the student sees them."""
        return ask(self.engine.forward, cell, stride=self.total_stride, student_stride=self._student_stride)

    def check(self, corpus: TrainingCorpus, recipe: Recipe, engine: Engine, progress: Progress) -> None:
        """Refuse another vocabulary, dimension or normalisation; load the model; measure its dev WER."""
        found = self.normalization
        check_vocabulary(self.checkpoint.vocabulary, corpus.vocabulary, self.where)
        check_input(self.checkpoint.recipe, recipe, self.where)
        if found.feature_dim != corpus.normalization.feature_dim:
            raise InputError(
                f"{self.where}: the teacher takes features of D = {found.feature_dim}, the corpus has "
                f"{corpus.normalization.feature_dim}; use a teacher of these features, or its soft targets"
            )
        if not alike(found, corpus.normalization):
            raise InputError(
                f"{self.where}: the teacher was trained with normalization {found.kind}, the student has "
                f"{corpus.normalization.kind} of another corpus or kind; they see the same values: use --normalization "
                f"{found.kind}, no --init_from of another corpus, or the teacher's soft targets (--soft_targets)"
            )
        # The student's weights are drawn next, and shall be those of a student without a teacher.
        with torch.random.fork_rng(devices=[]):
            model = restore_trained(self.checkpoint, self.where)
        model.head.add_auxiliary(reveals_features=self._reveals_features)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.engine.prepare(model, None)
        self.engine.training(False)
        if self.wer is None:
            loader = evaluation_loader(
                self.checkpoint, corpus.dev, num_workers=recipe.corpus.num_workers, device=engine.device
            )
            self.wer = measure_wer(self.engine, loader, self.protocol)
            self.engine.training(False)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        progress.say(
            f"teacher (online): {self.where}, {parameters / 1e6:.1f} M parameters, stride {self.total_stride}, dev WER "
            f"{_percent(self.wer)}"
        )


class CachedTeacher:
    """A teacher known by the soft targets that it left of the training clips."""

    num_features: int | None = None

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Open the soft targets."""
        self.where = str(folder)
        self.stored = SoftTargets(folder)
        job = self.stored.job
        self.fingerprint, self.total_stride = job.teacher, job.total_stride
        self.wer: float | None = self.stored.facts["teacher_wer"]
        self.protocol: str = self.stored.facts["protocol"]
        self._device = device
        self._train: Split | None = None

    def answer(self, cell: MicroBatch, *, made_up: bool = False) -> Answer:
        """Return the stored log-probabilities of a cell's clips."""
        if made_up:
            frames = sum(-(-length // self.total_stride) for length in cell.layout.input_lengths)
            return Answer(log_probs=stand_in(frames, self.stored.job.num_classes, self._device))
        assert self._train is not None, "soft targets that nobody checked"
        stored = torch.cat([self.stored.log_probs(self._train.id(clip)) for clip in cell.clips])
        return Answer(log_probs=stored.to(self._device))

    def check(self, corpus: TrainingCorpus, recipe: Recipe, engine: Engine, progress: Progress) -> None:
        """Refuse targets of other clips or glosses, and damaged ones."""
        check_vocabulary(self.stored.vocabulary, corpus.vocabulary, self.where)
        engine.together(lambda: self.stored.check(engine.rank, engine.world_size))
        train = corpus.train
        missing, others = [], []
        for index in range(len(train)):
            name = train.id(index)
            _, clip = self.stored.places.get(name, (None, None))
            if clip is None:
                missing.append(name)
            elif clip.frames != train.num_frames[index] or clip.digest != int(train.table.digests[train.row(index)]):
                others.append(name)
        problems = [
            f"{self.where}: {len(names)} of {len(train)} training clips {what}: {name_some(names, 5)}; these are the "
            "soft targets of another corpus or split: extract them from this one"
            for names, what in (
                (missing, "have none"),
                (others, "have other frames or glosses there (clips cut by --max_frames count as others)"),
            )
            if names
        ]
        if problems:
            raise InputError(problems)
        self._train = train
        progress.say(
            f"teacher (cached): {self.where}, {self.stored.job.compression.name}, stride {self.total_stride}, dev WER "
            f"{_percent(self.wer)}"
        )
        if self.wer is not None and self.protocol != recipe.run.protocol:
            progress.say(
                f"warning: that WER is by protocol {self.protocol}, the student's by {recipe.run.protocol}; they are "
                "not compared"
            )
            self.wer = None


def open_source(recipe: Recipe, engine: Engine, *, went_on: Path | None = None) -> OnlineTeacher | CachedTeacher | None:
    """Open the teacher that the recipe names, if it does; every rank reads it, and a problem of one is raised on all.

    `went_on`: the run directory whose checkpoint this attempt goes on from.
    Raises `InputError` if the run directory's record names another teacher, or a teacher where the recipe has none.
    """
    distillation, record = recipe.distillation, Path(recipe.run.output_dir) / RECORD

    def open_it() -> OnlineTeacher | CachedTeacher | None:
        found: OnlineTeacher | CachedTeacher | None = None
        if distillation.teacher:
            found = OnlineTeacher(find_checkpoint(Path(distillation.teacher)), engine, recipe)
        elif distillation.soft_targets:
            found = CachedTeacher(Path(distillation.soft_targets), engine.device)
        if found is not None:
            check_strides(found, recipe.model.total_stride)
        return found

    source = engine.together(open_it)
    # What the run learnt from before stands beside the checkpoint that it goes on from, here or in another folder.
    places = [record, *([went_on / RECORD] if went_on is not None else [])] if recipe.run.resume else []
    known: dict[str, Any] | None = engine.on_main(
        lambda: next((json.loads(place.read_text(encoding="utf-8")) for place in places if place.exists()), None)
    )
    fingerprints = engine.gather_objects(source.fingerprint if source is not None else "")
    if len(set(fingerprints)) > 1:
        raise InputError(
            f"{distillation.teacher or distillation.soft_targets}: ranks found different teachers there; name one "
            "checkpoint, RUN/checkpoints/step-…"
        )
    if known is not None and known["teacher"] != fingerprints[0]:
        what = f"{source.where} is another one" if source is not None else "no teacher is named now"
        raise InputError(
            f"{record}: the run learns from the teacher at {known['where']}, but {what}; go on with --teacher or "
            "--soft_targets of that one, or start a new --output_dir"
        )
    if known is not None and source is not None and known["protocol"] == source.protocol:
        # Measured by the first attempt.
        source.wer = known["wer"]
    return source


def adopt_normalization(
    corpus: TrainingCorpus, source: OnlineTeacher | CachedTeacher | None, progress: Progress
) -> TrainingCorpus:
    """Let a student that starts anew see the values that its online teacher sees, to the bit."""
    if not isinstance(source, OnlineTeacher):
        return corpus
    ours, theirs = corpus.normalization, source.normalization
    if ours.kind != theirs.kind or ours.feature_dim != theirs.feature_dim:
        # Refused where everything about the teacher is checked.
        return corpus
    if not alike(ours, theirs):
        progress.say(f"the student takes its normalization from {source.where}, whose corpus had other statistics")
    return dataclasses.replace(corpus, normalization=theirs)


def make_distillation(
    source: OnlineTeacher | CachedTeacher | None,
    recipe: Recipe,
    corpus: TrainingCorpus,
    engine: Engine,
    progress: Progress,
) -> Distillation | Undistilled:
    """Check the teacher against the corpus, and make its part in the loss."""
    if source is None:
        return Undistilled(recipe.distillation.target_ratio)
    source.check(corpus, recipe, engine, progress)
    return Distillation(source, recipe.distillation, total_stride=recipe.model.total_stride)


def evaluation_loader(
    checkpoint: Checkpoint, split: Split, *, num_workers: int, device: torch.device
) -> EvaluationLoader:
    """Load a split as a checkpoint's model wants it."""
    return EvaluationLoader(
        split=split,
        normalization=checkpoint.normalization,
        vocabulary=checkpoint.vocabulary,
        total_stride=checkpoint.recipe.model.total_stride,
        num_workers=num_workers,
        device=device,
    )


def measure_wer(
    engine: Engine, loader: EvaluationLoader, protocol: Any, stop_requested: Callable[[], bool] = lambda: False
) -> float | None:
    """Return the WER of an engine's model on a split, in percent; all ranks must ask.

    None without reference words, and where a request to stop came in between.
    """
    longest = int(slot_frames(loader.num_frames, loader.total_stride).max())
    try:
        budget = _CLIPS_PER_CELL * longest
        result = evaluate(engine, loader, budget=budget, protocol=protocol, stop_requested=stop_requested)
    except BrokenPassError as error:
        failure = TrainingFailedError(
            f"the teacher ran out of memory on {error}; extract its soft targets where there is more (signscale "
            "extract), and use --soft_targets"
        )
        failure.local = True
        raise failure from None
    return result.counts.wer if result is not None and math.isfinite(result.counts.wer) else None


def _percent(wer: float | None) -> str:
    return "unknown" if wer is None else f"{wer:.2f} %"
