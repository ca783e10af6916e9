"""Distillation: a student learns from CTC and from a teacher, asked in every step or by its stored soft targets.

The loss of a step is `alpha * T^2 * KL / F + (1 - alpha) * CTC / D`, and `feature_weight * (1 - cos) / F` where
features are compared. Both are sums over the output frames of the global batch, F of them, which every rank knows from
the plan, as it knows CTC's own denominator D. Blank frames that count less than others stay in F, so that it needs no
communication and no look at a distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import Labels, MicroBatch
from trainer.files import FencedFolder
from trainer.layout import TimeLayout, lay_out
from trainer.models.temporal_head import Outputs
from trainer.objectives.ctc import float32_log_probs
from trainer.objectives.distillation import align_features, align_frames, distance_sum, divergence_sum, soften
from trainer.recipe import DistillationRecipe
from trainer.scoring.decoding import best_path

RECORD = "distillation.json"
DISTILLATION_LOSS, FEATURE_LOSS = "distillation_loss", "feature_loss"

Term = tuple[str, float, Tensor]
"""Name, weight and value of a part of the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a teacher says of the clips of a micro-batch, in frames of its own stride, clip after clip."""

    log_probs: Tensor
    """Log-probabilities `[M, V]` at temperature 1."""
    features: Tensor | None = None
    """What its classifier saw, `[M, C]`, where it was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """The same on the student's frames, softened."""

    log_probs: Tensor
    features: Tensor | None = None


def ask(
    forward: Callable[[Tensor, TimeLayout], Outputs], cell: MicroBatch, *, stride: int, student_stride: int
) -> Answer:
    """Let a model of `stride` see the clips of a cell as the student sees them, without dropout."""
    layout = dataclasses.replace(cell.layout, row_seeds=None)
    if stride != student_stride:
        layout = lay_out(np.array(layout.input_lengths), stride).to(cell.features.device)
    outputs = forward(cell.features, layout)
    return Answer(log_probs=float32_log_probs(outputs.logits), features=outputs.features)


class Source(Protocol):
    """Where a teacher's distributions come from."""

    where: str
    fingerprint: str
    """What tells one teacher from another."""
    total_stride: int
    wer: float | None
    """Dev WER in percent, where it is known."""
    protocol: str

    @property
    def num_features(self) -> int | None:
        """Return the size of the features that it tells; None if it tells none."""

    def answer(self, cell: MicroBatch, *, made_up: bool) -> Answer:
        """Return what the teacher says of a cell's clips."""


class Undistilled:
    """What a run without a teacher does: nothing."""

    ctc_weight = 1.0
    """Weight of CTC."""
    term_names: tuple[str, ...] = ()
    """Names of the terms that the teacher adds."""
    compares_features = False
    """Whether the student's features are compared with a teacher's."""
    num_features: int | None = None
    """Size of the teacher's."""

    def __init__(self, target_ratio: float | None = None) -> None:
        self._ratio = target_ratio

    def targets(self, cell: MicroBatch, *, made_up: bool = False) -> Targets | None:
        """Return no targets."""
        return None

    def labels(self, cell: MicroBatch, targets: Targets | None) -> Labels:
        """Return the annotated glosses."""
        return cell.labels

    def terms(self, outputs: Outputs, targets: Targets | None, per_frame: float) -> list[Term]:
        """Return nothing to add."""
        return []

    def record(self, folder: FencedFolder) -> None:
        """Write nothing."""

    def verdict(self, student_wer: float | None) -> str:
        """Say that there is nobody to compare with, where the recipe asks for it."""
        return "" if self._ratio is None else f"; target_ratio {self._ratio:g} is not judged, since no teacher is named"


class Distillation:
    """The teacher's part in the loss of a step."""

    def __init__(self, source: Source, recipe: DistillationRecipe, *, total_stride: int) -> None:
        """Take the teacher of a student of `total_stride`."""
        self.source, self.alpha = source, float(recipe.distill_alpha)
        self._temperature, self._blank_weight = float(recipe.distill_temperature), float(recipe.distill_blank_weight)
        self._decodes = recipe.distill_labels == "teacher"
        self._stride, self._ratio = total_stride, recipe.target_ratio
        self._feature_weight = float(recipe.feature_weight)
        self.ctc_weight, self.compares_features = 1.0 - self.alpha, self._feature_weight > 0
        self.term_names = (DISTILLATION_LOSS, *([FEATURE_LOSS] if self.compares_features else []))

    @property
    def num_features(self) -> int | None:
        """Return the size of the teacher's features, where the student's are compared with them."""
        return self.source.num_features if self.compares_features else None

    @torch.no_grad()
    def targets(self, cell: MicroBatch, *, made_up: bool = False) -> Targets | None:
        """Return what the teacher says of a cell on the student's frames; None without clips.

        `made_up`: the cell is one for measuring, whose clips nobody knows.
        """
        if not cell.clips:
            return None
        said, lengths = self.source.answer(cell, made_up=made_up), cell.layout.input_lengths
        stride, to_stride = self.source.total_stride, self._stride
        features = said.features
        return Targets(
            log_probs=align_frames(
                soften(said.log_probs, self._temperature), lengths, stride=stride, to_stride=to_stride
            ),
            features=None
            if features is None
            else align_features(features, lengths, stride=stride, to_stride=to_stride),
        )

    def labels(self, cell: MicroBatch, targets: Targets | None) -> Labels:
        """Return the glosses that CTC learns; each clip keeps the weight that its annotation gives it.

        What the teacher decodes on the student's frames fits into them always. A clip in which it finds no gloss keeps
        its annotation.
        """
        if targets is None or not self._decodes:
            return cell.labels
        paths = targets.log_probs.argmax(dim=-1).cpu().split(list(cell.layout.output_lengths))
        annotated = cell.labels.classes.cpu().split(cell.labels.lengths.tolist())
        decoded = [torch.tensor([one.label for one in best_path(path.numpy())], dtype=torch.int64) for path in paths]
        chosen = [found if len(found) else given for found, given in zip(decoded, annotated, strict=True)]
        return dataclasses.replace(
            cell.labels,
            classes=torch.cat(chosen).to(cell.labels.classes.device),
            lengths=torch.tensor([len(part) for part in chosen], dtype=torch.int64),
        )

    def terms(self, outputs: Outputs, targets: Targets | None, per_frame: float) -> list[Term]:
        """Return what the teacher adds to the loss sum of a cell; `per_frame` brings sums to CTC's denominator."""
        found = []
        if targets is not None:
            divergence = divergence_sum(
                outputs.logits, targets.log_probs, temperature=self._temperature, blank_weight=self._blank_weight
            )
            found.append((DISTILLATION_LOSS, self.alpha, (self._temperature**2 * per_frame) * divergence))
        if self.compares_features:
            ours = outputs.features
            assert ours is not None, "the model was built without what reveals its features"
            if targets is None:
                # Without a clip there is nothing to compare; yet all ranks send the gradient of the projection.
                distance = 0.0 * ours.float().sum()
            else:
                assert targets.features is not None, "a teacher that tells no features"
                distance = per_frame * distance_sum(
                    ours, targets.features, targets.log_probs, blank_weight=self._blank_weight
                )
            found.append((FEATURE_LOSS, self._feature_weight, distance))
        return found

    def verdict(self, student_wer: float | None) -> str:
        """Say whether the student came as close to its teacher as the recipe asks."""
        ratio, wer = self._ratio, self.source.wer
        if ratio is None or student_wer is None:
            return ""
        if wer is None:
            return f"; target_ratio {ratio:g} cannot be judged, since the teacher's dev WER is unknown"
        limit, met = ratio * wer, student_wer <= ratio * wer
        said = "met" if met else "NOT met"
        return f"; target dev WER {limit:.2f} % ({ratio:g} x the teacher's {wer:.2f} %) {said} with {student_wer:.2f} %"

    def record(self, folder: FencedFolder) -> None:
        """Write who the teacher is into the run directory, on rank 0."""
        source = self.source
        facts = {"teacher": source.fingerprint, "where": source.where, "wer": source.wer, "protocol": source.protocol}
        folder.write_json(RECORD, facts)
