"""The proof of an export: the file against the trained model, clip by clip over a split."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.checkpoint.content import Checkpoint
from trainer.data.loader import EvaluationLoader
from trainer.data.table import Split
from trainer.errors import InputError, TrainingFailedError
from trainer.export.recognition import Recognition
from trainer.layout import slot_frames
from trainer.models.recognizer import Recognizer
from trainer.objectives.ctc import float32_log_probs
from trainer.scoring.decoding import best_path

_CLIPS_PER_CELL, _VIDEO_CLIPS_PER_CELL = 8, 2
_TOLERANCE = 1e-3
"""Largest difference of log-probabilities taken for rounding: sums of thousands in another order make 1e-5."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the comparison found."""

    split: str
    """Split compared on."""
    clips: int
    """Its clips."""
    same_hypotheses: int
    """Clips whose best path has the same glosses."""
    largest_difference: float
    """Largest difference of a log-probability, in nats."""

    def check(self) -> None:
        """Raise `TrainingFailedError` where the file is not the trained model."""
        if self.same_hypotheses < self.clips or not self.largest_difference <= _TOLERANCE:
            raise TrainingFailedError(
                f"the exported model is not the trained one: {self.clips - self.same_hypotheses} of {self.clips} "
                f"{self.split} clips have other hypotheses, log-probabilities differ by up to "
                f"{self.largest_difference:.2g}; nothing was written"
            )


def verify(recognition: Recognition, model: Recognizer, checkpoint: Checkpoint, clips: Split) -> Verification:
    """Compare an exported model, fed clip by clip, with the trained one, fed as in an evaluation."""
    loader = EvaluationLoader(
        split=clips,
        normalization=checkpoint.normalization,
        vocabulary=checkpoint.vocabulary,
        total_stride=model.total_stride,
        num_workers=0,
        device=torch.device("cpu"),
    )
    most = _VIDEO_CLIPS_PER_CELL if clips.is_video else _CLIPS_PER_CELL
    budget = most * int(slot_frames(loader.num_frames, loader.total_stride).max())
    same, largest = 0, 0.0
    with torch.no_grad(), contextlib.closing(loader.cells(rank=0, world_size=1, budget=budget)) as cells:
        for cell in cells:
            log_probs = float32_log_probs(model(cell.features, cell.layout)).numpy()
            parts = np.split(log_probs, np.cumsum(cell.layout.output_lengths)[:-1])
            for index, expected in zip(cell.clips, parts, strict=True):
                if clips.num_frames[index] < recognition.min_frames:
                    raise InputError(
                        f"clip {clips.id(index)}: has {clips.num_frames[index]} frames, this format takes "
                        f"{recognition.min_frames} or more; choose another --format, or another --split"
                    )
                found = recognition.scores(_read(clips, index))
                if found.shape != expected.shape:
                    raise TrainingFailedError(
                        f"the exported model gives {list(found.shape)} scores for clip {clips.id(index)}, the trained "
                        f"one {list(expected.shape)}; nothing was written"
                    )
                one, other = ([e.label for e in best_path(part.argmax(axis=1))] for part in (found, expected))
                same += one == other
                # A NaN must not vanish in a comparison.
                largest = float(np.maximum(largest, np.abs(found - expected).max()))
    return Verification(split=clips.name, clips=len(clips), same_hypotheses=same, largest_difference=largest)


def _read(clips: Split, index: int) -> npt.NDArray[Any]:
    """Read a clip as a user would hand it over: raw features, or frames, without the loader that prepares them."""
    storage = clips.storage
    shape = storage.frame_shape or (clips.feature_dim,)
    stored = clips.read(index, np.empty((int(clips.num_frames[index]), *shape), storage.dtype), verify=True)
    return stored if clips.is_video else np.array(storage.decode(stored), dtype=np.float32)
