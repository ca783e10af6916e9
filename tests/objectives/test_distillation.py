"""Distillation: the divergence written out, as a sum over frames, and a teacher's frames laid over a student's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.objectives.distillation import align_frames, divergence_sum, soften

CLASSES = 5


def draw(frames: int, seed: int) -> Tensor:
    return 2 * torch.randn(frames, CLASSES, generator=torch.Generator().manual_seed(seed))


def written_out(teacher: Tensor, student: Tensor, temperature: float) -> list[float]:
    """KL(teacher || student) of each frame, class by class."""
    found = []
    for t, s in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        found.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])
def test_the_divergence_is_the_sum_over_frames_of_what_is_written_out(temperature: float) -> None:
    teacher, student = draw(7, 0), draw(7, 1)
    got = divergence_sum(student, soften(teacher, temperature), temperature=temperature)
    assert got.item() == pytest.approx(sum(written_out(teacher, student, temperature)), rel=1e-5)
    assert divergence_sum(teacher, soften(teacher, temperature), temperature=temperature).item() == pytest.approx(
        0, abs=1e-6
    )


def test_the_gradient_is_the_difference_of_the_distributions_over_the_temperature() -> None:
    teacher, student = draw(6, 2), draw(6, 3).requires_grad_()
    divergence_sum(student, soften(teacher, 3.0), temperature=3.0).backward()
    expected = ((student.detach() / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 3
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=1e-5)


def test_cut_into_any_cells_the_sums_add_up() -> None:
    teacher, student = soften(draw(20, 4), 3.0), draw(20, 5)
    whole = divergence_sum(student, teacher, temperature=3.0)
    parts = [(0, 1), (1, 12), (12, 20)]
    cut = sum(divergence_sum(student[a:b], teacher[a:b], temperature=3.0).item() for a, b in parts)
    assert cut == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_frames_that_the_teacher_holds_for_blank_count_less(weight: float) -> None:
    teacher, student = draw(30, 6), draw(30, 7)
    each = written_out(teacher, student, 2.0)
    blank = teacher.argmax(dim=1) == 0
    assert 0 < int(blank.sum()) < 30
    expected = sum(value * (weight if is_blank else 1.0) for value, is_blank in zip(each, blank.tolist(), strict=True))
    got = divergence_sum(student, soften(teacher, 2.0), temperature=2.0, blank_weight=weight)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_and_autocast_do_not_reach_the_divergence() -> None:
    teacher, student = soften(draw(9, 8), 3.0), draw(9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = divergence_sum(student, teacher, temperature=3.0)
    assert got.dtype == torch.float32
    assert torch.equal(got, divergence_sum(student.float(), teacher, temperature=3.0))


def _frames(lengths: list[int], stride: int) -> list[int]:
    return [-(-length // stride) for length in lengths]


@pytest.mark.parametrize(("stride", "to_stride"), [(1, 4), (2, 4), (1, 2), (4, 1), (4, 2), (2, 1), (4, 4), (3, 6)])
def test_frames_of_another_stride_are_laid_over_the_clips_own(stride: int, to_stride: int) -> None:
    lengths = list(range(1, 26))
    theirs, ours = _frames(lengths, stride), _frames(lengths, to_stride)
    log_probs = soften(draw(sum(theirs), 10), 1.0)
    got = align_frames(log_probs, lengths, stride=stride, to_stride=to_stride)
    assert got.shape == (sum(ours), CLASSES)
    for length, own, aligned in zip(lengths, log_probs.split(theirs), got.split(ours), strict=True):
        for frame, row in enumerate(aligned):
            # The frames of the teacher that share an input frame with this one of the student.
            inputs = range(frame * to_stride, min((frame + 1) * to_stride, length))
            under = sorted({place // stride for place in inputs})
            torch.testing.assert_close(row.exp(), own[under].exp().mean(dim=0), atol=1e-6, rtol=1e-5)


def test_the_mean_of_finer_frames_teaches_what_all_of_them_teach() -> None:
    teacher, student = soften(draw(8, 11), 3.0), draw(4, 12)
    aligned = align_frames(teacher, [8], stride=1, to_stride=2)
    gradients = []
    for targets, rows in ((aligned, [0, 1, 2, 3]), (teacher, [0, 0, 1, 1, 2, 2, 3, 3])):
        logits = student.clone().requires_grad_()
        (divergence_sum(logits[rows], targets, temperature=3.0) / len(rows)).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
