"""Counts are integers that add up: over clips, over batches, over ranks, whatever the split."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.scoring.wer import WerCounts, count_errors

# Few distinct words, so that matches are common; one is a sub-string of another, one is more than letters.
words = st.lists(st.sampled_from(["A", "AB", "__ON__", "S+H", "ÜBER", "loc-A."]), max_size=7)
clips = st.lists(st.tuples(words, words), max_size=12)


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Levenshtein's recurrence, written out."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != found))
    return row[-1]


def count(pairs: Sequence[tuple[list[str], list[str]]]) -> WerCounts:
    return count_errors([reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs])


@settings(max_examples=150, deadline=None)
@given(clips)
def test_pooled_errors_equal_the_total_of_brute_force_distances(
    pairs: list[tuple[list[str], list[str]]],
) -> None:
    counts = count(pairs)
    assert counts.errors == sum(edit_distance(reference, hypothesis) for reference, hypothesis in pairs)
    assert counts.reference_words == sum(len(reference) for reference, _ in pairs)
    assert counts.hypothesis_words == sum(len(hypothesis) for _, hypothesis in pairs)
    assert counts.empty_hypotheses == sum(hypothesis == [] for _, hypothesis in pairs)
    assert counts.clips == len(pairs)
    assert counts.insertions - counts.deletions == counts.hypothesis_words - counts.reference_words


@settings(max_examples=150, deadline=None)
@given(clips, st.integers(1, 9))
def test_adding_the_counts_of_k_parts_equals_the_counts_of_the_whole(
    pairs: list[tuple[list[str], list[str]]], k: int
) -> None:
    parts = [count(pairs[rank::k]) for rank in range(k)]
    assert sum(parts, WerCounts.zero()) == count(pairs)
    all_reduced = [sum(column) for column in zip(*(part.as_vector() for part in parts), strict=True)]
    assert WerCounts.from_vector(all_reduced) == count(pairs)


def test_each_kind_of_error_is_counted_as_what_it_is() -> None:
    counts = count_errors(
        [["A", "B", "C"], ["A", "B", "C"], ["A", "B"], ["A"]],
        [["A", "X", "C"], ["A", "C"], ["A", "Y", "B"], []],
    )
    assert counts == WerCounts(
        substitutions=1,
        deletions=2,
        insertions=1,
        reference_words=9,
        hypothesis_words=8,
        clips=4,
        empty_hypotheses=1,
    )
    assert counts.wer == pytest.approx(100 * 4 / 9)
    assert counts.deletions_share == 0.5
    assert counts.empty_share == 0.25
    assert counts.mean_hypothesis_length == 2.0


def test_errors_are_pooled_and_never_averaged_over_clips() -> None:
    counts = count_errors([["A"], ["B"] * 9], [["X"], ["B"] * 9])
    assert counts.wer == pytest.approx(10.0)  # the mean over clips would be 50


def test_empty_references_cost_their_insertions() -> None:
    counts = count_errors([[], [], ["A"]], [["X", "Y"], [], ["A"]])
    assert (counts.insertions, counts.errors, counts.reference_words) == (2, 2, 1)
    assert counts.wer == 200.0


def test_without_reference_words_the_wer_is_zero_or_infinite_and_json_can_hold_it() -> None:
    silent = count_errors([[]], [[]])
    assert silent.wer == 0.0
    talking = count_errors([[]], [["X"]])
    assert talking.wer == math.inf
    assert json.loads(json.dumps(talking.as_dict(), allow_nan=False))["wer"] is None


def test_no_clips_at_all_count_nothing_and_divide_by_nothing() -> None:
    counts = count_errors([], [])
    assert counts == WerCounts.zero()
    assert (counts.wer, counts.deletions_share, counts.empty_share, counts.mean_hypothesis_length) == (
        0,
        0,
        0,
        0,
    )


def test_words_are_compared_whole_whatever_they_hold() -> None:
    odd = ["[UNK]", "<unk>", "it's", "a.b", "ÄÖ", "IX+1", "-", "A B"]
    assert count_errors([odd], [odd]).errors == 0
    assert count_errors([["A B"]], [["A", "B"]]).errors == 2
    assert count_errors([["WOLKE"]], [["Wolke"]]).errors == 1


def test_a_string_in_place_of_a_list_of_words_is_refused() -> None:
    with pytest.raises(TypeError, match="split it first"):
        count_errors(["A B"], [["A", "B"]])
    with pytest.raises(TypeError, match="split it first"):
        count_errors([["A", "B"]], ["A B"])


def test_unequal_numbers_of_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        count_errors([["A"], ["B"]], [["A"]])


def test_a_vector_of_another_length_is_refused() -> None:
    vector = count_errors([["A"]], [["B"]]).as_vector()
    assert all(type(value) is int for value in vector)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        WerCounts.from_vector(vector[:-1])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        WerCounts.from_vector([*vector, 0])


def test_the_dictionary_holds_counts_and_rates() -> None:
    summary = count_errors([["A", "B"], ["C"]], [["A"], []]).as_dict()
    assert summary == {
        "wer": pytest.approx(200 / 3),
        "errors": 2,
        "substitutions": 0,
        "deletions": 2,
        "insertions": 0,
        "reference_words": 3,
        "hypothesis_words": 1,
        "clips": 2,
        "empty_hypotheses": 1,
        "deletions_share": 1.0,
        "empty_share": 0.5,
        "mean_hypothesis_length": 0.5,
    }


def test_the_scoring_room_imports_no_torch() -> None:
    modules = "trainer.scoring.wer, trainer.scoring.protocols, trainer.scoring.ctm_stm, launch.score"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
