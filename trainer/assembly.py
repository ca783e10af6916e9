"""Putting a training run together: all input checked, then all parts built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from trainer.backbones import load_published, settle_norm
from trainer.checkpoint.content import Checkpoint, RunState, read_checkpoint
from trainer.checkpoint.store import CheckpointStore, find_checkpoint, run_folder_of
from trainer.data.augment import augmentation_of
from trainer.data.cost import FRAMES_ONLY, CostModel, read_cost_model
from trainer.data.loader import EvaluationLoader, TrainingLoader, make_plan
from trainer.data.normalization import Normalization
from trainer.data.prepare import TrainingCorpus, prepare_corpus
from trainer.data.table import Split
from trainer.data.vocabulary import BLANK
from trainer.distillation_checks import check_auxiliary
from trainer.distillation_sources import adopt_normalization, make_distillation, open_source
from trainer.engine import Engine
from trainer.errors import InputError, name_some
from trainer.files import FencedFolder
from trainer.job.rank import NO_JOB, Job, NoJob
from trainer.loop import TrainingRun
from trainer.loss import StepLoss
from trainer.models.auxiliary import AUXILIARY
from trainer.models.build import build_model, load_weights, starts_fresh
from trainer.models.recognizer import Recognizer
from trainer.observe.progress import Progress
from trainer.observe.trackers import open_trackers
from trainer.recipe import VIDEO_MODELS, Recipe
from trainer.relief import Relief
from trainer.run_directory import check_same_recipe, claim, make_folder, record
from trainer.signals import StopRequest


def build_run(
    recipe: Recipe, engine: Engine, progress: Progress, stop: StopRequest, job: Job | NoJob = NO_JOB
) -> TrainingRun:
    """Check all input, then put the parts together; the run directory is written to only once all is right."""
    recipe = with_absolute_paths(recipe)
    run_dir = Path(recipe.run.output_dir)
    folder = FencedFolder(run_dir, job.check)
    store = CheckpointStore(run_dir, keep=recipe.run.keep_checkpoints, job=job)
    existed = engine.on_main(lambda: _enter(recipe, job, progress))
    path, goes_on = engine.on_main(lambda: _find_start(recipe, store, progress, existed=existed))
    start = engine.together(lambda: read_checkpoint(path) if path else None)
    recipe = settle_norm(recipe, start.recipe if start else None)
    resumed = start if goes_on else None
    if resumed is not None:
        check_same_recipe(resumed.recipe, recipe, str(path))
        _check_same_objective(resumed.recipe, recipe, str(path))
        progress.say(f"going on from step {resumed.state.step} (epoch {resumed.state.epoch})")
    cost_model = engine.on_main(
        lambda: read_cost_model(Path(recipe.batch.cost_model)) if recipe.batch.cost_model else FRAMES_ONLY
    )
    teacher = open_source(recipe, engine, went_on=run_folder_of(path) if path is not None and goes_on else None)
    corpus = prepare_corpus(
        recipe.corpus,
        recipe.model.total_stride,
        engine,
        progress.say,
        known=_known_normalization(start, recipe),
        checked=resumed.state.files_hash if resumed else "",
        video=recipe.model.model in VIDEO_MODELS,
    )
    _check_corpus(corpus, resumed, engine, progress, recipe)
    if start is None:
        corpus = adopt_normalization(corpus, teacher, progress)
    distillation = make_distillation(teacher, recipe, corpus, engine, progress)
    model = build_model(recipe.model, feature_dim=corpus.normalization.feature_dim, num_classes=len(corpus.vocabulary))
    # Drawn last, so that a model starts from the same weights with and without.
    StepLoss(objective=recipe.objective, distillation=distillation).equip(model)
    if start is not None:
        if resumed is not None:
            check_auxiliary(model, resumed.model, where=str(path))
        _load_start(model, start, corpus, progress, where=str(path))
    elif said := load_published(model, recipe, engine):
        progress.say(said)
    extra = sum(weight.numel() for name, weight in model.named_parameters() if name.startswith(AUXILIARY))
    parameters = sum(parameter.numel() for parameter in model.parameters()) - extra
    engine.prepare(model, recipe.optimization)
    state = RunState()
    if resumed is not None:
        engine.load(resumed.optimizer)
        state = resumed.state
        if state.loss_scale:
            engine.loss_scale.restore(state.loss_scale)
    state.num_clips, state.world_size = len(corpus.train), engine.world_size
    state.clips_hash, state.files_hash = corpus.clips_hash, corpus.files_hash
    engine.on_main(lambda: _begin_writing(recipe, engine, job, progress, existed=existed))
    engine.on_main(lambda: distillation.record(folder))
    if not engine.on_main(lambda: store.go_back_to(state, progress.say)):
        # The best checkpoint went with the steps that were lost: the next validation is the best one again.
        state.best = state.best_step = None
    for_training = f" and {extra / 1e6:.2f} M for training alone" if extra else ""
    progress.say(
        f"{recipe.model.model}: {parameters / 1e6:.1f} M parameters{for_training}; {len(corpus.train)} training and "
        f"{len(corpus.dev)} dev clips, {len(corpus.vocabulary) - 1} glosses, {corpus.train.input_name}; "
        f"global batch {recipe.global_batch_size(engine.world_size)} clips on {engine.world_size} rank(s)"
    )
    trackers = (
        open_trackers(
            folder,
            recipe.run.trackers,
            after_step=state.step if resumed else -1,
            project=recipe.run.wandb_project,
            recipe=recipe.flat(),
        )
        if engine.is_main
        else []
    )
    return TrainingRun(
        recipe=recipe,
        engine=engine,
        corpus=corpus,
        state=state,
        loader=make_training_loader(recipe, corpus, engine, cost_model),
        dev=_evaluation_loader(recipe, corpus, engine, corpus.dev),
        train_subset=_train_subset(recipe, corpus, engine),
        store=store,
        trackers=trackers,
        progress=progress,
        stop=stop,
        relief=Relief(engine, recipe, folder, trackers, progress.say),
        distillation=distillation,
        folder=folder,
    )


def _enter(recipe: Recipe, job: Job | NoJob, progress: Progress) -> bool:
    """See that the run directory is new, or this recipe's and nobody else at work on it; tell whether it existed."""
    run_dir = Path(recipe.run.output_dir)
    job.check_run(run_dir)
    existed = claim(recipe)
    if existed:
        job.take_run(run_dir, progress.say)
    return existed


def _begin_writing(recipe: Recipe, engine: Engine, job: Job | NoJob, progress: Progress, *, existed: bool) -> None:
    """Take the run directory, and say in it what is to be done there; another may have come first by now."""
    run_dir = Path(recipe.run.output_dir)
    job.check_run(run_dir)
    make_folder(run_dir)
    job.take_run(run_dir, progress.say)
    FencedFolder(run_dir, job.check).clear()
    if not existed and claim(recipe):
        raise InputError(f"{run_dir}: another command has begun this run meanwhile; give yours again")
    record(recipe, world_size=engine.world_size, device=str(engine.device), fence=job.check)


def _check_same_objective(stored: Recipe, recipe: Recipe, where: str) -> None:
    """Refuse to give a run a teacher in mid-course, or to take it away; which teacher it is, `open_source` checks."""
    had, has = (bool(one.distillation.teacher or one.distillation.soft_targets) for one in (stored, recipe))
    if had != has:
        raise InputError(
            f"{where}: the run {'learns from the teacher of its first command' if had else 'has no teacher'}, but "
            f"{'one' if has else 'no teacher'} is named now; go on as it began, or start a new --output_dir "
            "(--init_from keeps the weights)"
        )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Let the stored recipe find the corpus and the teacher from any folder."""
    corpus = recipe.corpus
    annotations = str(Path(corpus.annotations).absolute()) if corpus.annotations else ""
    # An address means the same everywhere.
    data_dir = corpus.data_dir if "://" in corpus.data_dir else str(Path(corpus.data_dir).absolute())
    teacher, soft_targets = (
        str(Path(path).absolute()) if path else ""
        for path in (recipe.distillation.teacher, recipe.distillation.soft_targets)
    )
    return dataclasses.replace(
        recipe,
        corpus=dataclasses.replace(corpus, data_dir=data_dir, annotations=annotations),
        distillation=dataclasses.replace(recipe.distillation, teacher=teacher, soft_targets=soft_targets),
    )


def make_training_loader(
    recipe: Recipe, corpus: TrainingCorpus, engine: Engine, cost_model: CostModel = FRAMES_ONLY
) -> TrainingLoader:
    """Build the loader of the training plan."""
    return TrainingLoader(
        split=corpus.train,
        normalization=corpus.normalization,
        plan=make_plan(
            corpus.train,
            total_stride=recipe.model.total_stride,
            seed=recipe.run.seed,
            augmentation=augmentation_of(recipe.corpus),
            mixup_alpha=recipe.objective.mixup_alpha,
            shuffle_window=recipe.batch.shuffle_window,
        ),
        vocabulary=corpus.vocabulary,
        objective=recipe.objective,
        num_workers=recipe.corpus.num_workers,
        device=engine.device,
        cost_model=cost_model,
    )


def _evaluation_loader(recipe: Recipe, corpus: TrainingCorpus, engine: Engine, split: Split) -> EvaluationLoader:
    return EvaluationLoader(
        split=split,
        normalization=corpus.normalization,
        vocabulary=corpus.vocabulary,
        total_stride=recipe.model.total_stride,
        num_workers=recipe.corpus.num_workers,
        device=engine.device,
    )


def _train_subset(recipe: Recipe, corpus: TrainingCorpus, engine: Engine) -> EvaluationLoader | None:
    """Choose the training clips whose WER is followed: by their ids, so that the choice never changes."""
    count = min(recipe.run.train_wer_clips, len(corpus.train))
    chosen = np.sort(np.argpartition(corpus.train.keys, max(0, count - 1))[:count])
    return _evaluation_loader(recipe, corpus, engine, corpus.train.choose(chosen)) if count else None


def _find_start(
    recipe: Recipe, store: CheckpointStore, progress: Progress, *, existed: bool
) -> tuple[Path | None, bool]:
    """Find the checkpoint that weights come from, if any, and tell whether the run goes on from it."""
    if recipe.run.resume == "auto":
        path = store.newest_sound(progress.say)
        if path is not None:
            return path, True
        if existed:
            progress.say(f"{recipe.run.output_dir}: no sound checkpoint, starting from the beginning")
    elif recipe.run.resume:
        return find_checkpoint(Path(recipe.run.resume), prefer="last"), True
    if not recipe.run.init_from or Path(recipe.run.init_from).is_file():
        # A file holds weights of a published backbone, which are no checkpoint.
        return None, False
    return find_checkpoint(Path(recipe.run.init_from)), False


def _known_normalization(start: Checkpoint | None, recipe: Recipe) -> Normalization | None:
    """Return the normalisation that loaded weights were trained with: they expect no other."""
    if start is None:
        return None
    if start.normalization.kind != recipe.corpus.normalization and recipe.model.model not in VIDEO_MODELS:
        raise InputError(
            f"normalization: the loaded weights were trained with {start.normalization.kind}, the recipe says "
            f"{recipe.corpus.normalization}; use --normalization {start.normalization.kind}"
        )
    return start.normalization


def _check_corpus(
    corpus: TrainingCorpus, resumed: Checkpoint | None, engine: Engine, progress: Progress, recipe: Recipe
) -> None:
    """Refuse a corpus that does not fit the run or the ranks; name the clips that leave training."""
    if resumed is not None:
        resumed.vocabulary.check_same(corpus.vocabulary, recipe.corpus.annotations or recipe.corpus.data_dir)
        if resumed.state.clips_hash != corpus.clips_hash:
            # Another set or order of clips is another plan: the cursor would point to nothing it knows.
            raise InputError(
                f"{recipe.corpus.data_dir}: the training clips are not those of the run ({resumed.state.num_clips} "
                f"clips then, {len(corpus.train)} now; ids, order, frames or glosses differ); restore the corpus, or "
                "start a new --output_dir (--init_from keeps the weights)"
            )
        if resumed.state.files_hash != corpus.files_hash:
            checked = "its records have checksums" if corpus.is_packed else "all were checked again"
            progress.say(
                "warning: the features are not those of the last attempt (changed, packed anew, or another dtype); "
                f"{checked}, but values may differ from those the run has seen"
            )
    if engine.world_size > len(corpus.train):
        raise InputError(
            f"{recipe.corpus.data_dir}: {len(corpus.train)} training clips for {engine.world_size} ranks; start at "
            "most as many ranks as there are clips"
        )
    if corpus.infeasible:
        progress.say(
            f"{len(corpus.infeasible)} training clips have fewer output frames than CTC needs and leave training: "
            f"{name_some(corpus.infeasible, limit=len(corpus.infeasible))}"
        )
    batch = recipe.global_batch_size(engine.world_size)
    if engine.world_size > batch:
        progress.say(f"warning: a global batch of {batch} clips leaves {engine.world_size - batch} ranks idle")


def _load_start(
    model: Recognizer, start: Checkpoint, corpus: TrainingCorpus, progress: Progress, *, where: str
) -> None:
    """Load weights into the bare model; classes are matched by gloss."""
    classes: list[int | None] | None = None
    if start.vocabulary != corpus.vocabulary:
        known = start.vocabulary
        fresh = known.unknown(corpus.vocabulary.glosses)
        classes = [BLANK, *(None if g in fresh else known.encode([g])[0] for g in corpus.vocabulary.glosses)]
        progress.say(
            f"{where}: its vocabulary differs; {len(classes) - 1 - len(fresh)} glosses keep their weights, "
            f"{len(fresh)} start fresh"
        )
    own = model.state_dict()
    left = [name for name in start.model if name.startswith(AUXILIARY) and name not in own]
    fresh_parts = starts_fresh(own, start.model, by_class=classes is not None)
    for names, what in ((left, "left out"), (fresh_parts, "started fresh")):
        if names:
            progress.say(f"{where}: {name_some(names)}: for training alone, {what}")
    load_weights(model, start.model, classes=classes, where=where)
