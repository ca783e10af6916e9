"""Distillation: a student learns from CTC and from a teacher, asked in every step or by its stored soft targets.

The loss of a step is `alpha * T^2 * KL / F + (1 - alpha) * CTC / D`: the divergence is a sum over the output frames of
the global batch, F of them, which every rank knows from the plan, as it knows CTC's own denominator D. Blank frames
that count less than others stay in F, so that it needs no communication and no look at a distribution.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.batch import Labels, MicroBatch
from trainer.data.loader import StepShare
from trainer.files import write_json
from trainer.objectives.distillation import align_frames, divergence_sum, soften
from trainer.recipe import DistillationRecipe
from trainer.scoring.decoding import best_path

RECORD = "distillation.json"


class Source(Protocol):
    """Where a teacher's distributions come from."""

    where: str
    fingerprint: str
    """What tells one teacher from another."""
    total_stride: int
    wer: float | None
    """Dev WER in percent, where it is known."""
    protocol: str

    def log_probs(self, cell: MicroBatch, *, made_up: bool) -> Tensor:
        """Return log-probabilities `[M, V]` at temperature 1 of a cell's clips, in frames of the teacher's stride."""


class Undistilled:
    """What a run without a teacher does: nothing."""

    active = False
    """Whether there is a teacher."""

    def __init__(self, target_ratio: float | None = None) -> None:
        self._ratio = target_ratio

    def scale(self, share: StepShare) -> float:
        """Return nothing that is used."""
        return 0.0

    def targets(self, cell: MicroBatch, *, made_up: bool = False) -> Tensor | None:
        """Return no targets."""
        return None

    def labels(self, cell: MicroBatch, targets: Tensor | None) -> Labels:
        """Return the annotated glosses."""
        return cell.labels

    def blend(self, ctc_sum: Tensor, logits: Tensor, targets: Tensor | None, scale: float) -> Tensor:
        """Return CTC alone."""
        return ctc_sum

    def part(self, loss: float, ctc_loss: float) -> float:
        """Return what the teacher adds to a loss."""
        return loss - ctc_loss

    def record(self) -> None:
        """Write nothing."""

    def verdict(self, student_wer: float | None) -> str:
        """Say that there is nobody to compare with, where the recipe asks for it."""
        return "" if self._ratio is None else f"; target_ratio {self._ratio:g} is not judged, since no teacher is named"


class Distillation:
    """The teacher's part in the loss of a step."""

    active = True

    def __init__(self, source: Source, recipe: DistillationRecipe, *, total_stride: int, run_dir: Path) -> None:
        """Take the teacher of a student of `total_stride`."""
        self.source, self.alpha = source, float(recipe.distill_alpha)
        self._temperature, self._blank_weight = float(recipe.distill_temperature), float(recipe.distill_blank_weight)
        self._decodes = recipe.distill_labels == "teacher"
        self._stride, self._ratio, self._run_dir = total_stride, recipe.target_ratio, run_dir

    def scale(self, share: StepShare) -> float:
        """Return what a divergence is multiplied by so that the step's one denominator makes it a mean over frames."""
        return share.denominator / int((-(-share.batch.num_frames // self._stride)).sum())

    @torch.no_grad()
    def targets(self, cell: MicroBatch, *, made_up: bool = False) -> Tensor | None:
        """Return the teacher's softened log-probabilities on the student's frames, `[M, V]`; None without clips.

        `made_up`: the cell is one for measuring, whose clips nobody knows.
        """
        if not cell.clips:
            return None
        softened = soften(self.source.log_probs(cell, made_up=made_up), self._temperature)
        return align_frames(
            softened, cell.layout.input_lengths, stride=self.source.total_stride, to_stride=self._stride
        )

    def labels(self, cell: MicroBatch, targets: Tensor | None) -> Labels:
        """Return the glosses that CTC learns; each clip keeps the weight that its annotation gives it.

        What the teacher decodes on the student's frames fits into them always. A clip in which it finds no gloss keeps
        its annotation.
        """
        if targets is None or not self._decodes:
            return cell.labels
        paths = targets.argmax(dim=-1).cpu().split(list(cell.layout.output_lengths))
        annotated = cell.labels.classes.cpu().split(cell.labels.lengths.tolist())
        decoded = [torch.tensor([one.label for one in best_path(path.numpy())], dtype=torch.int64) for path in paths]
        chosen = [found if len(found) else given for found, given in zip(decoded, annotated, strict=True)]
        return dataclasses.replace(
            cell.labels,
            classes=torch.cat(chosen).to(cell.labels.classes.device),
            lengths=torch.tensor([len(part) for part in chosen], dtype=torch.int64),
        )

    def blend(self, ctc_sum: Tensor, logits: Tensor, targets: Tensor | None, scale: float) -> Tensor:
        """Return the loss sum of a cell, whose denominator is that of CTC."""
        if targets is None:
            return (1.0 - self.alpha) * ctc_sum
        divergence = divergence_sum(logits, targets, temperature=self._temperature, blank_weight=self._blank_weight)
        return (1.0 - self.alpha) * ctc_sum + (self.alpha * self._temperature**2 * scale) * divergence

    def part(self, loss: float, ctc_loss: float) -> float:
        """Return the teacher's part of a step's loss, T^2 x KL per frame, before it is weighted."""
        return (loss - (1.0 - self.alpha) * ctc_loss) / self.alpha if self.alpha else 0.0

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

    def record(self) -> None:
        """Write who the teacher is into the run directory, on rank 0."""
        source = self.source
        facts = {"teacher": source.fingerprint, "where": source.where, "wer": source.wer, "protocol": source.protocol}
        write_json(self._run_dir / RECORD, facts)
