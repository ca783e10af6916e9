"""From a recipe to a model, and weights of another run into it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.errors import InputError, name_some
from trainer.models.teacher import FeatureTeacher
from trainer.recipe import ModelRecipe

_CLASSIFIER = "head.classifier."


def build_model(recipe: ModelRecipe, *, feature_dim: int, num_classes: int) -> FeatureTeacher:
    """Build the model that the recipe names; weights come from torch's seeded generator."""
    return FeatureTeacher(
        feature_dim=feature_dim,
        num_classes=num_classes,
        total_stride=recipe.total_stride,
        width=recipe.width,
        rnn_size=recipe.rnn_size,
        rnn_layers=recipe.rnn_layers,
        dropout=recipe.dropout,
        streams=recipe.streams,
    )


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], *, classes: list[int | None] | None = None, where: str
) -> None:
    """Load a state dict into a model of the same architecture.

    `classes`: for each class of the model the class it has in `weights`, or None to keep its fresh row; needed where
    the vocabularies differ. Raises `InputError` with the parameters that do not fit.
    """
    own = model.state_dict()
    loaded = dict(weights)
    if classes is not None:
        for name in [name for name in own if name.startswith(_CLASSIFIER) and name in weights]:
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
