"""The CTC objective: the textbook sum, in float32, under weights that make any mean of the global batch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from trainer.objectives.ctc import ctc_losses, ctc_objective, float32_log_probs, uniform_divergences


@dataclass(frozen=True)
class Labels:
    classes: Tensor
    lengths: Tensor
    weights: Tensor


def make_labels(targets: list[list[int]], weights: list[float] | None = None) -> Labels:
    return Labels(
        classes=torch.tensor([label for target in targets for label in target]),
        lengths=torch.tensor([len(target) for target in targets]),
        weights=torch.tensor([1.0] * len(targets) if weights is None else weights),
    )


LENGTHS = [9, 4, 12]
TARGETS = [[1, 2, 2], [3], [4, 1, 4, 5, 5]]
PARTNERS = [[2], [1, 3], [1, 2, 3]]
CLASSES = 6


def draw_logits(lengths: list[int] = LENGTHS, classes: int = CLASSES, seed: int = 0) -> Tensor:
    return 2 * torch.randn(sum(lengths), classes, generator=torch.Generator().manual_seed(seed))


def enumerate_loss(logits: Tensor, target: list[int]) -> Tensor:
    """Return -log of the summed probability of every path `[T]` that collapses to the target, in float64."""
    log_probs = logits.double().log_softmax(dim=-1)
    num_frames, num_classes = logits.shape
    paths = [
        path
        for path in itertools.product(range(num_classes), repeat=num_frames)
        if [label for label, _ in itertools.groupby(path) if label] == target
    ]
    rows = torch.tensor(paths)
    return -log_probs.gather(1, rows.t()).sum(dim=0).logsumexp(dim=0)


def torch_mean(logits: Tensor, lengths: list[int], targets: list[list[int]]) -> Tensor:
    """Return what everyone else trains with: F.ctc_loss(reduction="mean") on a padded batch."""
    padded = pad_sequence(list(logits.log_softmax(dim=-1).split(lengths)))
    labels = make_labels(targets)
    return F.ctc_loss(padded, labels.classes, torch.tensor(lengths), labels.lengths, reduction="mean")


# Plain CTC.


@pytest.mark.parametrize("target", [[1], [2], [1, 2], [2, 1], [1, 1], [2, 2], [1, 2, 1]])
@pytest.mark.parametrize("num_frames", [3, 4, 5])
def test_the_loss_and_its_gradient_are_those_of_all_paths_enumerated(target: list[int], num_frames: int) -> None:
    logits = draw_logits([num_frames], classes=3, seed=num_frames).requires_grad_()
    ctc_objective(logits, [num_frames], make_labels([target])).backward()
    assert logits.grad is not None
    exact = logits.detach().double().requires_grad_()
    expected = enumerate_loss(exact, target)
    expected.backward()
    got = ctc_objective(logits, [num_frames], make_labels([target]))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)


def test_finite_differences_agree_with_the_gradient_of_the_whole_objective() -> None:
    labels, partners = make_labels(TARGETS, [0.7, 0.3, 1.0]), make_labels(PARTNERS, [0.3, 0.1, 0.0])

    def objective(logits: Tensor) -> Tensor:
        return ctc_objective(logits, LENGTHS, labels, partners, 0.2)

    logits = draw_logits().requires_grad_()
    objective(logits).backward()
    assert logits.grad is not None
    for seed in range(4):
        direction = F.normalize(draw_logits(seed=seed + 1).flatten(), dim=0).view_as(logits)
        with torch.no_grad():
            slope = (objective(logits + 0.05 * direction) - objective(logits - 0.05 * direction)) / 0.1
        assert slope.item() == pytest.approx((logits.grad * direction).sum().item(), abs=2e-3)


@settings(max_examples=25, deadline=None)
@given(
    clips=st.lists(
        st.tuples(st.integers(8, 25), st.lists(st.integers(1, CLASSES - 1), min_size=1, max_size=4)),
        min_size=1,
        max_size=6,
    )
)
def test_weights_of_one_over_target_length_over_the_clips_give_torchs_mean(
    clips: list[tuple[int, list[int]]],
) -> None:
    lengths, targets = [length for length, _ in clips], [target for _, target in clips]
    one, other = (draw_logits(lengths).requires_grad_() for _ in range(2))
    labels = make_labels(targets, [1 / len(target) for target in targets])
    ours = ctc_objective(one, lengths, labels) / len(clips)
    theirs = torch_mean(other, lengths, targets)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_cut_into_micro_batches_sums_to_the_same_loss_and_gradient() -> None:
    whole, parts = (draw_logits().requires_grad_() for _ in range(2))
    weights = [0.5, 0.25, 2.0]
    ctc_objective(whole, LENGTHS, make_labels(TARGETS, weights), label_smoothing=0.1).backward()
    for part, length, target, weight in zip(parts.split(LENGTHS), LENGTHS, TARGETS, weights, strict=True):
        ctc_objective(part, [length], make_labels([target], [weight]), label_smoothing=0.1).backward()
    torch.testing.assert_close(whole.grad, parts.grad, rtol=1e-5, atol=1e-7)


def test_losses_are_one_number_a_clip_whatever_its_neighbours() -> None:
    log_probs = float32_log_probs(draw_logits())
    losses = ctc_losses(log_probs, LENGTHS, make_labels(TARGETS))
    assert losses.shape == (3,)
    for part, length, target, loss in zip(log_probs.split(LENGTHS), LENGTHS, TARGETS, losses, strict=True):
        torch.testing.assert_close(ctc_losses(part, [length], make_labels([target]))[0], loss)


# Weights.


def test_a_clip_of_weight_zero_leaves_no_trace_in_loss_or_gradient() -> None:
    logits = draw_logits().requires_grad_()
    loss = ctc_objective(logits, LENGTHS, make_labels(TARGETS, [1.0, 0.0, 1.0]), label_smoothing=0.1)
    loss.backward()
    assert logits.grad is not None
    first, idle, last = logits.grad.split(LENGTHS)
    assert not idle.any()
    assert first.any()
    assert last.any()
    others = torch.cat([logits.split(LENGTHS)[i] for i in (0, 2)])
    alone = ctc_objective(others, [9, 12], make_labels([TARGETS[0], TARGETS[2]]), label_smoothing=0.1)
    torch.testing.assert_close(loss, alone)


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_softmax_and_ctc_are_float32_even_inside_autocast(dtype: torch.dtype) -> None:
    logits = draw_logits().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs = float32_log_probs(logits)
        loss = ctc_objective(logits, LENGTHS, make_labels(TARGETS), label_smoothing=0.1)
    assert log_probs.dtype == loss.dtype == torch.float32
    # Nothing but the rounding of the logits themselves is lost.
    outside = ctc_objective(logits.float(), LENGTHS, make_labels(TARGETS), label_smoothing=0.1)
    assert torch.equal(loss, outside)
    assert (log_probs.double().exp().sum(dim=-1) - 1).abs().max() < 1e-6


def test_very_large_logits_stay_finite() -> None:
    logits = (500 * draw_logits()).requires_grad_()
    loss = ctc_objective(logits, LENGTHS, make_labels(TARGETS), label_smoothing=0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


# Label smoothing and mixup.


def test_the_divergence_is_the_textbook_sum_over_valid_frames() -> None:
    logits = draw_logits()
    probs = np.exp(logits.double().numpy())
    probs /= probs.sum(axis=1, keepdims=True)
    per_frame = (probs * np.log(probs / (1 / CLASSES))).sum(axis=1)
    expected = [part.sum() for part in np.split(per_frame, np.cumsum(LENGTHS)[:-1])]
    got = uniform_divergences(float32_log_probs(logits), LENGTHS)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
    assert (got > 0).all()


def test_a_uniform_model_is_at_no_distance_from_uniform() -> None:
    got = uniform_divergences(float32_log_probs(torch.zeros(25, CLASSES)), LENGTHS)
    torch.testing.assert_close(got, torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_mixes_ctc_with_the_divergence_under_the_same_weights(smoothing: float) -> None:
    logits, weights = draw_logits(), [0.5, 0.25, 2.0]
    losses = [recursive_loss(part, target) for part, target in zip(logits.split(LENGTHS), TARGETS, strict=True)]
    divergences = uniform_divergences(float32_log_probs(logits), LENGTHS).tolist()
    expected = sum(
        w * ((1 - smoothing) * loss + smoothing * divergence)
        for w, loss, divergence in zip(weights, losses, divergences, strict=True)
    )
    got = ctc_objective(logits, LENGTHS, make_labels(TARGETS, weights), label_smoothing=smoothing)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup_mixes_the_losses_against_both_targets_by_their_shares(smoothing: float) -> None:
    logits, shares = draw_logits(), [0.7, 1.0, 0.5]
    expected = 0.0
    divergences = uniform_divergences(float32_log_probs(logits), LENGTHS).tolist()
    for part, target, partner, share, divergence in zip(
        logits.split(LENGTHS), TARGETS, PARTNERS, shares, divergences, strict=True
    ):
        mixed = share * recursive_loss(part, target) + (1 - share) * recursive_loss(part, partner)
        expected += (1 - smoothing) * mixed + smoothing * divergence
    got = ctc_objective(
        logits,
        LENGTHS,
        make_labels(TARGETS, shares),
        make_labels(PARTNERS, [1 - share for share in shares]),
        smoothing,
    )
    assert got.item() == pytest.approx(expected, rel=1e-5)


def recursive_loss(logits: Tensor, target: list[int]) -> float:
    """Return the loss by the forward recursion of Graves et al. 2006, in float64; for clips too long to enumerate."""
    probs = logits.double().softmax(dim=-1).tolist()
    extended = [0]
    for label in target:
        extended += [label, 0]
    alpha = [0.0] * len(extended)
    alpha[0], alpha[1] = probs[0][0], probs[0][extended[1]]
    for frame in probs[1:]:
        before = alpha
        alpha = [0.0] * len(extended)
        for s, label in enumerate(extended):
            total = before[s] + (before[s - 1] if s else 0.0)
            if s >= 2 and label and label != extended[s - 2]:
                total += before[s - 2]
            alpha[s] = total * frame[label]
    return -math.log(alpha[-1] + alpha[-2])


def test_the_recursion_above_agrees_with_enumeration() -> None:
    for target in ([1], [1, 2], [2, 2]):
        logits = draw_logits([5], classes=3)
        assert recursive_loss(logits, target) == pytest.approx(enumerate_loss(logits, target).item())
