"""From a recipe to a model, and weights of another run into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import InputError, name_some
from trainer.models.auxiliary import AUXILIARY, VISUAL
from trainer.models.i3d import I3DTeacher
from trainer.models.mobilenet import MobileNetStudent
from trainer.models.recognizer import Recognizer
from trainer.models.student import FeatureStudent
from trainer.models.teacher import FeatureTeacher
from trainer.recipe import ModelRecipe

_CLASSIFIERS = ("head.classifier.", VISUAL)
"""Parameters that have a row for each class."""


def build_model(recipe: ModelRecipe, *, feature_dim: int, num_classes: int) -> Recognizer:
    """Build the model that the recipe names; weights come from torch's seeded generator."""
    return ARCHITECTURES[recipe.model](recipe, feature_dim, num_classes)


def _over_features(kind: type[FeatureTeacher] | type[FeatureStudent]) -> Builder:
    def build(recipe: ModelRecipe, feature_dim: int, num_classes: int) -> Recognizer:
        return kind(
            feature_dim=feature_dim,
            num_classes=num_classes,
            total_stride=recipe.total_stride,
            width=recipe.width,
            streams=recipe.streams,
            **_head(recipe),
        )

    return build


def _over_frames(kind: Callable[..., Recognizer]) -> Builder:
    def build(recipe: ModelRecipe, feature_dim: int, num_classes: int) -> Recognizer:
        """Frames have no D, and may have any size."""
        return kind(
            num_classes=num_classes,
            total_stride=recipe.total_stride,
            width=recipe.width,
            norm=recipe.norm or ("frozen" if recipe.pretrained else "group"),
            **_head(recipe),
        )

    return build


def _head(recipe: ModelRecipe) -> dict[str, Any]:
    """Return what every architecture's head takes of the recipe."""
    return {"rnn_size": recipe.rnn_size, "rnn_layers": recipe.rnn_layers, "dropout": recipe.dropout}


Builder = Callable[[ModelRecipe, int, int], Recognizer]
ARCHITECTURES: dict[str, Builder] = {
    "teacher": _over_features(FeatureTeacher),
    "student": _over_features(FeatureStudent),
    "i3d": _over_frames(I3DTeacher),
    "mobilenet_v3_small": _over_frames(partial(MobileNetStudent, architecture="mobilenet_v3_small")),
    "mobilenet_v3_large": _over_frames(partial(MobileNetStudent, architecture="mobilenet_v3_large")),
}
"""Who builds which `model` of the recipe, given the recipe, D and the number of classes."""


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], *, classes: list[int | None] | None = None, where: str
) -> None:
    """Load a state dict into a model of the same architecture.

    What training alone adds to a model is taken where both have it, in one shape: else it is left out, or starts fresh.
    `classes`: for each class of the model the class it has in `weights`, or None to keep its fresh row; needed where
    the vocabularies differ. Raises `InputError` with the parameters that do not fit.
    """
    own = model.state_dict()
    loaded = dict(weights)
    for name in [name for name in weights if name.startswith(AUXILIARY) and name not in own]:
        del loaded[name]
    loaded |= {name: own[name] for name in starts_fresh(own, weights, by_class=classes is not None)}
    if classes is not None:
        for name in [name for name in own if name.startswith(_CLASSIFIERS) and name in weights]:
            if weights[name].shape[1:] != own[name].shape[1:]:
                # Of another width altogether, as is said below.
                continue
            rows = own[name].clone()
            for row, source in enumerate(classes):
                if source is not None:
                    rows[row] = weights[name][source]
            loaded[name] = rows
    missing = [name for name in own if name not in loaded]
    unknown = [name for name in loaded if name not in own]
    misfits = [
        f"{name} {list(loaded[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in loaded and loaded[name].shape != own[name].shape
    ]
    problems = [
        f"{where}: {what} {name_some(names, 5)}; use the model options it was trained with"
        for what, names in (("lacks", missing), ("has in excess", unknown), ("holds", misfits))
        if names
    ]
    if problems:
        raise InputError(problems)
    with torch.no_grad():
        model.load_state_dict(loaded)


def starts_fresh(own: dict[str, Tensor], weights: dict[str, Tensor], *, by_class: bool = False) -> list[str]:
    """Name the auxiliary weights of a model that another's cannot give it: it has none, or those of another teacher.

    `by_class`: rows are matched class by class, so that their number may differ.
    """

    def fits(name: str) -> bool:
        if name not in weights:
            return False
        return (by_class and name.startswith(VISUAL)) or weights[name].shape == own[name].shape

    return [name for name in own if name.startswith(AUXILIARY) and not fits(name)]
