"""Scoring protocols: what happens to a hypothesis before its errors are counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal, get_args

from trainer.scoring.wer import WerCounts, count_errors

Protocol = Literal["plain", "phoenix2014", "phoenix2014_merge"]
"""`plain` scores words as they are; `phoenix2014` applies the official clean-up to hypotheses first;
`phoenix2014_merge` then also merges adjacent repeats, as many published figures do without saying."""

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

# The rules of the corpus's own preprocessing script, in its order, which matters: `ZEIGEN-PLUSPLUS` becomes
# `ZEIGEN`, since the screen rule runs before the suffix goes. The script reads a CTM file, one word a line:
# its multi-word rules (WIE AUSSEHEN, spelled letters, repeated words) can never fire and have no place here.
_REPLACEMENTS_BEFORE_SCREEN = (
    ("loc-", ""),
    ("cl-", ""),
    ("qu-", ""),
    ("poss-", ""),
    ("lh-", ""),
    ("S0NNE", "SONNE"),
    ("HABEN2", "HABEN"),
    ("__EMOTION__", ""),
    ("__PU__", ""),
    ("__LEFTHAND__", ""),
)
_ROOM_AFTER_TWO_CAPITALS = re.compile("([A-Z][A-Z])RAUM")
_DROPPED_MARKERS = ("__LEFTHAND__", "__EPENTHESIS__", "__EMOTION__")


def clean_hypothesis(words: Iterable[str], protocol: Protocol) -> list[str]:
    """Apply a protocol's clean-up to the words of one hypothesis, one word at a time.

    Never to be applied to references: the published ones are clean, and cleaning them changes the figures.
    Raises ValueError for an unknown protocol. Source: PHOENIX-2014's evaluation package (Koller et al. 2015).
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if protocol == "plain":
        return list(words)
    cleaned = [clean for word in words if (clean := _clean_word(word))]
    if protocol == "phoenix2014_merge":
        return [word for word, _ in groupby(cleaned)]
    return cleaned


def score(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]], protocol: Protocol) -> WerCounts:
    """Count errors under a protocol: hypotheses are cleaned, references are left alone."""
    return count_errors(references, [clean_hypothesis(words, protocol) for words in hypotheses])


def _clean_word(word: str) -> str:
    """Clean one word; the empty string means that it is dropped."""
    for old, new in _REPLACEMENTS_BEFORE_SCREEN:
        word = word.replace(old, new)
    if word.endswith("ZEIGEN"):
        word += "-BILDSCHIRM"
    word = _ROOM_AFTER_TWO_CAPITALS.sub(r"\1", word)
    word = word.replace("-PLUSPLUS", "")
    return "" if any(marker in word for marker in _DROPPED_MARKERS) else word
