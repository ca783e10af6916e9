"""The prefix beam search finds what adding up all alignments finds, with and without a language model."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scoring.test_lm import TRIGRAM
from trainer.scoring.beam import BeamSearch, Fusion, search
from trainer.scoring.decoding import Emission, align, best_path, confidence
from trainer.scoring.lm import LanguageModel, read_arpa

WIDE = 10_000
Floats = npt.NDArray[np.float64]


def posterior(seed: int, num_frames: int, classes: int, *, sharpness: float = 2.0) -> Floats:
    logits = np.random.default_rng(seed).normal(size=(num_frames, classes)) * sharpness
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in groupby(path) if label)


def all_sequences(log_probs: Floats) -> dict[tuple[int, ...], float]:
    """ln of the probability of every gloss sequence, from all V^T alignments one by one."""
    sums: dict[tuple[int, ...], float] = defaultdict(float)
    num_frames, classes = log_probs.shape
    for path in product(range(classes), repeat=num_frames):
        sums[collapse(path)] += math.exp(sum(log_probs[t, label] for t, label in enumerate(path)))
    return {sequence: math.log(mass) for sequence, mass in sums.items()}


def spell(model: LanguageModel, sequence: tuple[int, ...]) -> float:
    state, total = model.start, 0.0
    for label in sequence:
        total += float(model.scores(state)[label])
        state = model.advance(state, label)
    return total + float(model.scores(state)[0])


shapes = st.tuples(st.integers(1, 5), st.integers(2, 4))


@given(seed=st.integers(0, 10_000), shape=shapes)
def test_a_wide_beam_finds_the_most_probable_sequence(seed: int, shape: tuple[int, int]) -> None:
    log_probs = posterior(seed, *shape)
    expected = all_sequences(log_probs)
    assert tuple(search(log_probs, WIDE)) == max(expected, key=expected.__getitem__)


@given(
    seed=st.integers(0, 10_000),
    shape=shapes,
    weight=st.sampled_from([0.3, 1.0, 3.0]),
    reward=st.sampled_from([-1.0, 0.0, 2.0]),
)
def test_with_a_language_model_it_finds_the_best_sum(
    seed: int, shape: tuple[int, int], weight: float, reward: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "trigram.arpa"
    path.write_text(TRIGRAM)
    model = read_arpa(path, ["A", "B", "C"][: shape[1] - 1])
    log_probs = posterior(seed, *shape)
    scores = {
        sequence: score + weight * spell(model, sequence) + reward * len(sequence)
        for sequence, score in all_sequences(log_probs).items()
    }
    found = tuple(search(log_probs, WIDE, Fusion(model=model, weight=weight, insertion=reward)))
    assert scores[found] == pytest.approx(max(scores.values()), abs=1e-9)


def test_the_search_prefers_many_alignments_to_the_best_one() -> None:
    # The best path is all blanks, 0.36; the gloss has 0.24 + 0.24 + 0.16 over its three alignments.
    log_probs = np.log(np.array([[0.6, 0.4], [0.6, 0.4]]))
    assert not list(best_path(log_probs.argmax(axis=1)))
    assert search(log_probs, 10) == [1]
    assert search(log_probs[:1], 10) == []


def test_a_repeated_gloss_needs_a_blank_between() -> None:
    sure = np.full((3, 3), 1e-6)
    sure[[0, 1, 2], [1, 0, 1]] = 1.0
    assert search(np.log(sure), 3) == [1, 1]
    sure[1] = [1e-6, 1.0, 1e-6]
    assert search(np.log(sure), 3) == [1]


def test_a_posterior_with_zeros_leaves_only_what_is_possible() -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    assert BeamSearch(width=10)(log_probs) == [
        Emission(label=1, start=0, frames=1),
        Emission(label=2, start=1, frames=2),
    ]


@given(seed=st.integers(0, 10_000), num_frames=st.integers(1, 30))
def test_where_the_model_is_sure_the_beam_and_the_best_path_agree_in_labels_and_times(
    seed: int, num_frames: int
) -> None:
    log_probs = posterior(seed, num_frames, 6, sharpness=100.0)
    gap = np.sort(log_probs, axis=1)
    if (gap[:, -1] - gap[:, -2]).min() < 10.0:
        return
    assert BeamSearch(width=10)(log_probs) == list(best_path(log_probs.argmax(axis=1)))


@given(seed=st.integers(0, 10_000), shape=shapes)
def test_the_alignment_is_the_most_probable_of_all(seed: int, shape: tuple[int, int]) -> None:
    log_probs = posterior(seed, *shape)
    labels = search(log_probs, 10)
    score = lambda path: sum(log_probs[t, label] for t, label in enumerate(path))  # noqa: E731
    best = max((p for p in product(range(shape[1]), repeat=shape[0]) if list(collapse(p)) == labels), key=score)
    assert align(log_probs, labels) == list(best_path(np.array(best)))


def test_glosses_that_the_frames_cannot_spell_are_refused() -> None:
    with pytest.raises(ValueError, match="2 frames cannot spell 2"):
        align(posterior(0, 2, 3), [1, 1])
    assert len(align(posterior(0, 3, 3), [1, 1])) == 2
    impossible = np.array([[0.0, -np.inf]])
    with pytest.raises(ValueError, match="probability 0"):
        align(impossible, [1])


def test_confidence_is_the_mean_posterior_over_the_frames_of_a_gloss() -> None:
    log_probs = np.log(np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]], dtype=np.float32))
    assert confidence(log_probs, Emission(label=1, start=0, frames=2)) == pytest.approx(0.65)


def test_scores_that_are_not_numbers_are_not_decoded() -> None:
    log_probs = posterior(0, 4, 3)
    log_probs[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        BeamSearch()(log_probs)


def test_a_beam_narrower_than_the_tree_still_finds_better_sequences_than_the_best_path() -> None:
    gains = []
    for seed in range(50):
        log_probs = posterior(seed, 5, 4)
        probabilities = all_sequences(log_probs)
        greedy = tuple(emission.label for emission in best_path(log_probs.argmax(axis=1)))
        gains.append(probabilities[tuple(search(log_probs, 4))] - probabilities[greedy])
    assert sum(gain > 0 for gain in gains) > 3 * sum(gain < 0 for gain in gains) > 0
    assert np.mean(gains) > 0.05
