"""A teacher made up for measuring: as large as the one that a recipe names, of which its recipe alone is read."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.checkpoint.content import RECIPE
from trainer.checkpoint.store import find_checkpoint
from trainer.data.batch import MicroBatch
from trainer.distillation import Answer, Distillation, Undistilled, ask
from trainer.engine.precision import PreciseModel
from trainer.models.build import build_model
from trainer.models.recognizer import Recognizer
from trainer.parsing import load_recipe
from trainer.recipe import Recipe
from trainer.softtargets.store import SoftTargets, stand_in


class MadeUpTeacher:
    """A teacher whose weights are any: what its passes take does not depend on them."""

    where = fingerprint = "made up"
    protocol = "plain"
    wer: float | None = None

    def __init__(self, model: Recognizer, recipe: Recipe, device: torch.device) -> None:
        """Take the model, and the recipe of its student."""
        self.total_stride, self._student_stride = model.total_stride, recipe.model.total_stride
        self.num_features: int | None = model.head.num_features
        self._model = PreciseModel(model.to(device).eval(), recipe.distillation.teacher_precision, device)

    def answer(self, cell: MicroBatch, *, made_up: bool) -> Answer:
        """Pass a cell through the model."""
        return ask(self._model, cell, stride=self.total_stride, student_stride=self._student_stride)


class MadeUpSoftTargets:
    """Soft targets of any clip."""

    where = fingerprint = "made up"
    protocol = "plain"
    wer: float | None = None
    num_features: int | None = None

    def __init__(self, total_stride: int, num_classes: int, device: torch.device) -> None:
        self.total_stride, self._num_classes, self._device = total_stride, num_classes, device

    def answer(self, cell: MicroBatch, *, made_up: bool) -> Answer:
        """Return as many frames as soft targets have."""
        frames = sum(-(-length // self.total_stride) for length in cell.layout.input_lengths)
        return Answer(log_probs=stand_in(frames, self._num_classes, self._device))


def make_up_teacher(
    recipe: Recipe, *, feature_dim: int, num_classes: int, device: torch.device
) -> Distillation | Undistilled:
    """Return what a recipe's teacher adds to a step; raises `InputError` if what it names is no teacher."""
    named = recipe.distillation
    source: MadeUpTeacher | MadeUpSoftTargets
    if named.teacher:
        # Whoever draws weights next shall draw those of a model without a teacher.
        with torch.random.fork_rng(devices=[]):
            model = _build(recipe, feature_dim, num_classes)
        source = MadeUpTeacher(model, recipe, device)
    elif named.soft_targets:
        source = MadeUpSoftTargets(SoftTargets(Path(named.soft_targets)).job.total_stride, num_classes, device)
    else:
        return Undistilled()
    return Distillation(source, named, total_stride=recipe.model.total_stride)


def teacher_bytes(recipe: Recipe, *, feature_dim: int, num_classes: int) -> int:
    """Return what the weights of a recipe's online teacher take on every rank; 0 without one.

    They are float32: `teacher_precision` chooses the operations' type, as a student's does.
    """
    if not recipe.distillation.teacher:
        return 0
    with torch.device("meta"):
        model = _build(recipe, feature_dim, num_classes)
    return sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))


def _build(recipe: Recipe, feature_dim: int, num_classes: int) -> Recognizer:
    theirs = load_recipe(find_checkpoint(Path(recipe.distillation.teacher)) / RECIPE)
    model = build_model(theirs.model, feature_dim=feature_dim, num_classes=num_classes)
    model.head.add_auxiliary(reveals_features=recipe.distillation.feature_weight > 0)
    # As a teacher's are: of weights that learn, autocast would keep casts.
    return model.requires_grad_(False)
