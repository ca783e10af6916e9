"""What every trained model is to its user, whether it lies in a run or in an exported file: one clip in, scores out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.checkpoint.content import Checkpoint
from trainer.data.normalization import Normalization
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError
from trainer.export.clip_model import Normalize
from trainer.layout import lay_out
from trainer.models.build import build_model, load_weights
from trainer.models.recognizer import Recognizer
from trainer.objectives.ctc import float32_log_probs
from trainer.recipe import VIDEO_MODELS, ModelRecipe

Floats = npt.NDArray[np.float32]
ClipScores = Callable[[npt.NDArray[Any]], Floats]
"""One clip, features `[T, D]` or frames uint8 `[T, crop, crop, 3]`, to log-probabilities `[ceil(T / stride), V]`."""

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an exported file says of itself: all that using it needs beside its weights."""

    glosses: tuple[str, ...]
    """The gloss of class i + 1; class 0 is the blank."""
    feature_dim: int
    """Values of a frame."""
    total_stride: int
    """Input frames per output frame."""
    normalization: str
    """Kind of the normalisation, which is part of the file."""
    model: dict[str, Any]
    """The model part of the recipe."""
    step: int
    """Optimizer steps of the checkpoint."""
    frame_size: int = 0
    """Pixels a side to which frames of a video are brought, by bilinear interpolation; 0: the model takes features."""
    crop_size: int = 0
    """Pixels a side of the middle of it, which is what goes in."""

    @property
    def is_video(self) -> bool:
        """Tell whether the model takes frames."""
        return self.frame_size > 0

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Return the shape of a frame as it goes in."""
        return (self.crop_size, self.crop_size, 3) if self.is_video else (self.feature_dim,)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Card:
        """Describe a checkpoint."""
        corpus, is_video = checkpoint.recipe.corpus, checkpoint.recipe.model.model in VIDEO_MODELS
        return cls(
            glosses=checkpoint.vocabulary.glosses,
            feature_dim=checkpoint.normalization.feature_dim,
            total_stride=checkpoint.recipe.model.total_stride,
            normalization=checkpoint.normalization.kind,
            model=dataclasses.asdict(checkpoint.recipe.model),
            step=checkpoint.state.step,
            frame_size=corpus.frame_size if is_video else 0,
            crop_size=corpus.frame_crop if is_video else 0,
        )

    def to_json(self) -> str:
        """Write the card as JSON."""
        return json.dumps({"signscale_export": _VERSION, "blank": 0, **vars(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | None, where: Path) -> Card:
        """Read what `to_json` wrote; raises `InputError` for anything else."""
        try:
            content: dict[str, Any] = json.loads(text or "")
            if content.pop("signscale_export") != _VERSION:
                raise InputError(f"{where}: was exported by another version; export it anew")
            del content["blank"]
            return cls(**{**content, "glosses": tuple(content["glosses"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{where}: holds no description by `signscale export`; export the run anew") from None


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """A model ready for use."""

    card: Card
    """What it is."""
    vocabulary: Vocabulary
    """Its glosses."""
    scores: ClipScores
    """One clip in, log-probabilities out."""
    min_frames: int = 1
    """Shortest clip it takes."""

    @classmethod
    def of(cls, card: Card, scores: ClipScores, min_frames: int = 1) -> Recognition:
        """Put a model and its description together."""
        return cls(card=card, vocabulary=Vocabulary(card.glosses), scores=scores, min_frames=min_frames)


def restore_model(card: Card, weights: dict[str, Tensor], where: str) -> Recognizer:
    """Build a model in evaluation mode; raises `InputError` for weights that are not its own."""
    try:
        recipe = ModelRecipe(**card.model)
    except TypeError as error:
        raise InputError(f"{where}: was written by another version ({error}); use that version") from None
    model = build_model(recipe, feature_dim=card.feature_dim, num_classes=len(card.glosses) + 1)
    load_weights(model, weights, where=where)
    return model.eval()


def recognition_of(model: Recognizer, normalization: Normalization, card: Card) -> Recognition:
    """Use a model of the trainer's own, one clip at a time."""
    normalize = Normalize(normalization)

    def scores(clip: npt.NDArray[Any]) -> Floats:
        with torch.no_grad():
            layout = lay_out(np.array([len(clip)]), model.total_stride)
            logits = model(normalize(torch.from_numpy(clip)), layout)
            return float32_log_probs(logits).numpy()

    return Recognition.of(card, scores)
