"""Runs as training leaves them, without training: a model of fresh weights, published as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.checkpoint.content import Checkpoint, RunState
from trainer.checkpoint.store import CheckpointStore
from trainer.data.normalization import from_moments
from trainer.data.opening import OpenCorpus
from trainer.data.vocabulary import Vocabulary
from trainer.models.build import build_model
from trainer.parsing import parse_recipe


def publish(run: Path, corpus: Path, *flags: str, step: int = 2, best: bool = True) -> Path:
    """Publish a checkpoint of the model that the flags describe, for a corpus of features; return the run."""
    data = ["--data_dir", str(corpus), "--output_dir", str(run), "--normalization", "none"]
    recipe = parse_recipe([*data, *flags])
    split = OpenCorpus(recipe.corpus, lambda text: None).split("train")
    vocabulary = Vocabulary(split.table.all_glosses())
    torch.manual_seed(step)
    model = build_model(recipe.model, feature_dim=split.feature_dim, num_classes=len(vocabulary))
    checkpoint = Checkpoint(
        recipe=recipe,
        vocabulary=vocabulary,
        normalization=from_moments("none", [], split.feature_dim),
        state=RunState(step=step),
        model=model.state_dict(),
        optimizer={},
    )
    CheckpointStore(run, keep=5).publish(checkpoint, is_best=best)
    return run
