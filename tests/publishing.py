"""Runs as training leaves them, without training: a model of fresh weights, published as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.content import Checkpoint, RunState
from trainer.checkpoint.store import CheckpointStore
from trainer.data.normalization import from_moments, of_frames
from trainer.data.opening import OpenCorpus
from trainer.data.vocabulary import Vocabulary
from trainer.models.build import build_model
from trainer.parsing import parse_recipe
from trainer.recipe import VIDEO_MODELS


def publish(
    run: Path,
    corpus: Path,
    *flags: str,
    step: int = 2,
    best: bool = True,
    change: Callable[[dict[str, Tensor]], None] | None = None,
) -> Path:
    """Publish a checkpoint of the model that the flags describe, for its corpus; return the run.

    `change` may alter the fresh weights in place.
    """
    data = ["--data_dir", str(corpus), "--output_dir", str(run), "--normalization", "none"]
    recipe = parse_recipe([*data, *flags])
    is_video = recipe.model.model in VIDEO_MODELS
    split = OpenCorpus(recipe.corpus, lambda text: None, video=is_video).split("train")
    vocabulary = Vocabulary(split.table.all_glosses())
    torch.manual_seed(step)
    model = build_model(recipe.model, feature_dim=split.feature_dim, num_classes=len(vocabulary))
    weights = model.state_dict()
    if change:
        change(weights)
    checkpoint = Checkpoint(
        recipe=recipe,
        vocabulary=vocabulary,
        normalization=of_frames() if is_video else from_moments("none", [], split.feature_dim),
        state=RunState(step=step),
        model=weights,
        optimizer={},
    )
    CheckpointStore(run, keep=5).publish(checkpoint, is_best=best)
    return run
