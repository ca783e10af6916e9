"""The best path: repeats merge, blanks go, and every gloss knows when it was signed."""

from __future__ import annotations

from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.scoring.decoding import best_path

frames = st.lists(st.integers(min_value=0, max_value=3), max_size=30)


def decode(labels: list[int], blank: int = 0) -> list[tuple[int, int, int]]:
    path = best_path(np.array(labels, dtype=np.int64), blank)
    return [(emission.label, emission.start, emission.frames) for emission in path]


@pytest.mark.parametrize(
    ("labels", "emissions"),
    [
        ([], []),
        ([0, 0, 0], []),
        ([3], [(3, 0, 1)]),
        ([1, 1, 1], [(1, 0, 3)]),
        ([0, 1, 1, 0, 1, 0], [(1, 1, 2), (1, 4, 1)]),
        ([1, 2, 2, 1], [(1, 0, 1), (2, 1, 2), (1, 3, 1)]),
        ([0, 0, 5, 5, 4, 0, 4], [(5, 2, 2), (4, 4, 1), (4, 6, 1)]),
    ],
)
def test_repeats_merge_and_blanks_part_them(labels: list[int], emissions: list[tuple[int, int, int]]) -> None:
    assert decode(labels) == emissions


@given(labels=frames)
def test_the_glosses_are_those_of_the_collapsed_path(labels: list[int]) -> None:
    assert [label for label, _, _ in decode(labels)] == [label for label, _ in groupby(labels) if label]


@given(labels=frames)
def test_the_spans_are_exactly_the_frames_that_are_not_blank(labels: list[int]) -> None:
    covered = [0] * len(labels)
    for label, start, count in decode(labels):
        assert covered[start : start + count] == [0] * count
        covered[start : start + count] = [label] * count
    assert covered == labels


@given(labels=frames)
def test_spans_are_in_order_and_as_long_as_can_be(labels: list[int]) -> None:
    emissions = decode(labels)
    for (label, start, count), (following, later, _) in pairwise(emissions):
        assert start + count <= later
        assert label != following or start + count < later


def test_the_blank_may_be_another_class() -> None:
    assert decode([2, 0, 0, 2, 1], blank=2) == [(0, 1, 2), (1, 4, 1)]


def test_a_first_frame_of_any_class_begins_a_gloss() -> None:
    # Also of the class -1 + 1, which a comparison with a made-up predecessor could swallow.
    for label in range(1, 5):
        assert decode([label, 0]) == [(label, 0, 1)]
