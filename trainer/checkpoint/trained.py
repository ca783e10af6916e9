"""From a checkpoint to the model that it holds."""

from __future__ import annotations

from trainer.checkpoint.content import Checkpoint
from trainer.models.build import build_model, load_weights
from trainer.models.recognizer import Recognizer


def restore_trained(checkpoint: Checkpoint, where: str) -> Recognizer:
    """Build a checkpoint's model with its weights, without what training alone needed; `where` names it in errors."""
    model = build_model(
        checkpoint.recipe.model,
        feature_dim=checkpoint.normalization.feature_dim,
        num_classes=len(checkpoint.vocabulary),
    )
    load_weights(model, checkpoint.model, where=where)
    return model
