"""PHOENIX-2014's clean-up: each official rule fires where it should, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.scoring.protocols import PROTOCOLS, clean_hypothesis, score


@pytest.mark.parametrize(
    ("word", "cleaned"),
    [
        ("loc-NORD", "NORD"),
        ("cl-KOMMEN", "KOMMEN"),
        ("qu-WAS", "WAS"),
        ("poss-EUCH", "EUCH"),
        ("lh-REGEN", "REGEN"),
        ("lh-loc-REGEN", "REGEN"),
        ("REGEN-PLUSPLUS", "REGEN"),
        ("WOLKE-loc-NORD", "WOLKE-NORD"),
        ("NORDRAUM", "NORD"),
        ("loc-ALPENRAUM", "ALPEN"),
        ("S0NNE", "SONNE"),
        ("S0NNENSCHEIN", "SONNENSCHEIN"),
        ("HABEN2", "HABEN"),
        ("ZEIGEN", "ZEIGEN-BILDSCHIRM"),
        ("loc-ZEIGEN", "ZEIGEN-BILDSCHIRM"),
        ("AUFZEIGEN", "AUFZEIGEN-BILDSCHIRM"),
        ("__PU__REGEN", "REGEN"),
        # The rules' order: the screen is looked for before the suffix goes.
        ("ZEIGEN-PLUSPLUS", "ZEIGEN"),
    ],
)
def test_the_clean_up_rewrites(word: str, cleaned: str) -> None:
    assert clean_hypothesis([word], "phoenix2014") == [cleaned]


@pytest.mark.parametrize(
    "word",
    [
        "__EMOTION__",
        "__PU__",
        "__LEFTHAND__",
        "__EPENTHESIS__",
        "loc-",
        "-PLUSPLUS",
        "__PU____EMOTION__",
        "lh-__EPENTHESIS__",
    ],
)
def test_the_clean_up_drops(word: str) -> None:
    assert clean_hypothesis(["A", word, "B"], "phoenix2014") == ["A", "B"]


@pytest.mark.parametrize(
    "word",
    [
        "__ON__",
        "__OFF__",
        "IX",
        "S+H",
        "SONNE",
        "HABEN",
        "HABEN-2",
        "LOC-NORD",
        "loc_NORD",
        "RAUM",
        "ARAUM",
        "A-RAUM",
        "nordRAUM",
        "PLUSPLUS",
        "PLUS",
        "ZEIGEN-BILDSCHIRM",
        "ZEIGENX",
        "zeigen",
        "EMOTION",
        "__emotion__",
        "PU",
        "LEFTHAND",
        "WIE-AUSSEHEN",
        "[EMPTY]",
    ],
)
def test_the_clean_up_leaves_alone(word: str) -> None:
    assert clean_hypothesis([word], "phoenix2014") == [word]


@pytest.mark.parametrize(
    "words",
    [
        ["WIE", "AUSSEHEN"],
        ["S", "H"],
        ["SCH", "A", "NN", "E"],
        ["REGEN", "REGEN"],
        ["S", "H", "REGEN", "REGEN", "WIE", "AUSSEHEN"],
    ],
)
def test_multi_word_rules_never_fire(words: list[str]) -> None:
    assert clean_hypothesis(words, "phoenix2014") == words


def test_merging_joins_adjacent_repeats_after_the_clean_up_only() -> None:
    words = ["REGEN", "loc-REGEN", "__PU__", "REGEN-PLUSPLUS", "WOLKE", "REGEN", "IX", "IX"]
    assert clean_hypothesis(words, "phoenix2014") == ["REGEN"] * 3 + ["WOLKE", "REGEN", "IX", "IX"]
    assert clean_hypothesis(words, "phoenix2014_merge") == ["REGEN", "WOLKE", "REGEN", "IX"]


def test_merging_leaves_other_multi_word_rules_off() -> None:
    words = ["WIE", "AUSSEHEN", "S", "H"]
    assert clean_hypothesis(words, "phoenix2014_merge") == words


def test_plain_changes_nothing() -> None:
    words = ["loc-NORD", "__PU__", "ZEIGEN", "ZEIGEN"]
    assert clean_hypothesis(words, "plain") == words


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_callers_words_are_left_as_they_are(protocol: Any) -> None:
    words = ["loc-NORD", "__PU__", "IX", "IX"]
    clean_hypothesis(words, protocol)
    assert words == ["loc-NORD", "__PU__", "IX", "IX"]


def test_references_are_never_cleaned() -> None:
    dirty = [["loc-NORD", "REGEN", "REGEN", "__PU__"]]
    assert score(dirty, dirty, "plain").errors == 0
    cleaned = score(dirty, dirty, "phoenix2014")
    assert (cleaned.substitutions, cleaned.deletions, cleaned.reference_words) == (1, 1, 4)
    assert score(dirty, dirty, "phoenix2014_merge").errors == 3


def test_the_clean_up_lowers_the_errors_of_raw_hypotheses() -> None:
    references = [["NORD", "REGEN", "ZEIGEN-BILDSCHIRM"], ["IX", "SONNE"]]
    hypotheses = [["loc-NORD", "__EMOTION__", "REGEN-PLUSPLUS", "ZEIGEN"], ["IX", "IX", "S0NNE"]]
    assert score(references, hypotheses, "plain").errors == 6
    assert score(references, hypotheses, "phoenix2014").errors == 1
    assert score(references, hypotheses, "phoenix2014_merge").errors == 0


def test_a_hypothesis_that_cleans_to_nothing_counts_as_empty() -> None:
    counts = score([["NORD", "WIND"]], [["__PU__", "__EPENTHESIS__"]], "phoenix2014")
    assert (counts.empty_hypotheses, counts.deletions, counts.hypothesis_words) == (1, 2, 0)


def test_an_unknown_protocol_is_refused_by_name() -> None:
    unknown: Any = "phoenix"
    with pytest.raises(ValueError, match=r"'phoenix'.*plain, phoenix2014, phoenix2014_merge"):
        clean_hypothesis(["A"], unknown)
