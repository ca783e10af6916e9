"""Published weights into the backbone of a fresh video model, and the norm that goes with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trainer.engine import Engine
from trainer.errors import InputError
from trainer.models.norms import Norm
from trainer.models.pretrained import load_backbone, read_weights
from trainer.models.recognizer import Recognizer
from trainer.models.vision import fetch_imagenet_weights
from trainer.recipe import VIDEO_MODELS, Recipe


def settle_norm(recipe: Recipe, start: Recipe | None) -> Recipe:
    """Choose the norm that a recipe leaves open, so that the stored recipe names it.

    It is that of the run whose weights are loaded (`start`), `frozen` where published weights are, else `group`.
    Raises `InputError` for frozen statistics that nothing brings.
    """
    if recipe.model.norm == "frozen" and start is None and not (recipe.model.pretrained or recipe.run.init_from):
        raise InputError(
            f"norm: frozen statistics come with loaded weights, and {recipe.run.output_dir} has no checkpoint to go on "
            "from; add --pretrained true or --init_from FILE, or use --norm group"
        )
    if recipe.model.model not in VIDEO_MODELS or recipe.model.norm is not None:
        return recipe
    fresh: Norm = "frozen" if recipe.model.pretrained or recipe.run.init_from else "group"
    norm = start.model.norm if start is not None else fresh
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, norm=norm))


def load_published(model: Recognizer, recipe: Recipe, engine: Engine) -> str:
    """Load the backbone's weights that the recipe asks for; return what to say about it, empty if it asks for none.

    For a model that starts fresh: weights of a run come by its checkpoint. All ranks must ask. Raises `InputError` if
    the weights cannot be had or belong to another architecture.
    """
    architecture, path = recipe.model.model, recipe.run.init_from
    if recipe.model.pretrained:
        weights = engine.on_main(lambda: fetch_imagenet_weights(architecture))
        return load_backbone(model, weights, architecture=architecture, where="ImageNet weights of torchvision")
    if path:
        weights = engine.together(lambda: read_weights(Path(path)))
        return load_backbone(model, weights, architecture=architecture, where=path)
    return ""
