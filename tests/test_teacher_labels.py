"""Sequence-level distillation: CTC learns what the teacher decodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trainer.data.batch import MicroBatch, make_labels
from trainer.distillation import Answer, Distillation
from trainer.layout import lay_out
from trainer.objectives.ctc import ctc_losses, float32_log_probs
from trainer.recipe import DistillationRecipe

CLASSES = 5


class Told:
    """A teacher whose likeliest class of each frame is told."""

    where, fingerprint, protocol = "told", "told", "plain"
    wer: float | None = None
    num_features: int | None = None

    def __init__(self, paths: list[list[int]], total_stride: int) -> None:
        self.total_stride = total_stride
        self._paths = torch.tensor([label for path in paths for label in path])

    def answer(self, cell: MicroBatch, *, made_up: bool) -> Answer:
        return Answer(log_probs=(4.0 * F.one_hot(self._paths, CLASSES).float()).log_softmax(dim=-1))


def make_cell(frames: list[int], annotated: list[list[int]]) -> MicroBatch:
    return MicroBatch(
        features=torch.zeros(sum(frames), 3),
        layout=lay_out(np.array(frames), 4),
        labels=make_labels([np.array(part) for part in annotated], np.array([0.5, 0.25, 1.0])),
        partner_labels=None,
        clips=(4, 7, 9),
    )


@pytest.mark.parametrize(
    ("labels", "expected"), [("teacher", [[1, 2, 2], [3], [4]]), ("annotations", [[3, 3], [1], [4]])]
)
def test_ctc_learns_what_the_teacher_decodes_with_the_weights_of_the_annotation(
    labels: str, expected: list[list[int]]
) -> None:
    # Repeats merge, a blank between two keeps them apart; where the teacher sees no gloss, the annotation stands.
    teacher = Told([[0, 1, 1, 2, 0, 2], [3, 3], [0, 0, 0]], total_stride=4)
    cell = make_cell([24, 7, 9], [[3, 3], [1], [4]])
    recipe = DistillationRecipe(teacher="told", distill_labels=labels)  # type: ignore[arg-type]
    distillation = Distillation(teacher, recipe, total_stride=4)
    found = distillation.labels(cell, distillation.targets(cell))
    assert [part.tolist() for part in found.classes.split(found.lengths.tolist())] == expected
    assert torch.equal(found.weights, cell.labels.weights)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_a_finer_teacher_decodes_fits_into_the_students_frames(stride: int) -> None:
    frames = [24, 7, 9]
    draws = np.random.default_rng(stride)
    paths = [draws.integers(0, CLASSES, -(-length // stride)).tolist() for length in frames]
    cell = make_cell(frames, [[3, 3], [1], [4]])
    recipe = DistillationRecipe(teacher="told", distill_labels="teacher")
    distillation = Distillation(Told(paths, stride), recipe, total_stride=4)
    found = distillation.labels(cell, distillation.targets(cell))
    logits = torch.zeros(sum(cell.layout.output_lengths), CLASSES)
    assert bool(ctc_losses(float32_log_probs(logits), cell.layout.output_lengths, found).isfinite().all())
