"""Word error rate as integer counts that add up over clips, batches and ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jiwer


@dataclass(frozen=True, slots=True, kw_only=True)
class WerCounts:
    """Hold the error counts of a set of clips; only counts are ever added, rates are read off the sum."""

    substitutions: int
    """Reference words replaced by another word."""
    deletions: int
    """Reference words the hypothesis leaves out."""
    insertions: int
    """Hypothesis words the reference does not have."""
    reference_words: int
    """Words in all references: the denominator of the WER."""
    hypothesis_words: int
    """Words in all hypotheses, as scored (after a protocol's clean-up)."""
    clips: int
    """Clips scored."""
    empty_hypotheses: int
    """Clips whose hypothesis has no word."""

    @classmethod
    def zero(cls) -> WerCounts:
        """Return the counts of no clip at all."""
        return cls.from_vector([0] * len(dataclasses.fields(cls)))

    @classmethod
    def from_vector(cls, vector: Iterable[int]) -> WerCounts:
        """Rebuild counts from `as_vector`, summed over ranks or not; ValueError on another length."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: int(value) for name, value in zip(names, vector, strict=True)})

    def as_vector(self) -> list[int]:
        """Lay the counts out as a fixed list of integers, ready for an int64 all-reduce (sum)."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def __add__(self, other: WerCounts) -> WerCounts:
        """Pool two disjoint sets of clips."""
        return WerCounts.from_vector(a + b for a, b in zip(self.as_vector(), other.as_vector(), strict=True))

    @property
    def errors(self) -> int:
        """Count substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Return errors in percent of reference words.

        Without any reference word it is 0.0 when there are no errors either, else infinity: an insertion
        against nothing has no finite rate, and 0 or 100 would pass for a result.
        """
        if self.reference_words == 0:
            return 0.0 if self.errors == 0 else math.inf
        return 100.0 * self.errors / self.reference_words

    @property
    def deletions_share(self) -> float:
        """Return the share of errors that are deletions (0..1; 0.0 without errors); near 1 = mute model."""
        return self.deletions / self.errors if self.errors else 0.0

    @property
    def empty_share(self) -> float:
        """Return the share of clips with an empty hypothesis (0..1; 0.0 without clips)."""
        return self.empty_hypotheses / self.clips if self.clips else 0.0

    @property
    def mean_hypothesis_length(self) -> float:
        """Return the mean number of hypothesis words a clip (0.0 without clips)."""
        return self.hypothesis_words / self.clips if self.clips else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Lay counts and rates out for JSON; an infinite WER becomes None, which JSON can hold."""
        return {
            "wer": self.wer if math.isfinite(self.wer) else None,
            "errors": self.errors,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "deletions_share": self.deletions_share,
            "empty_share": self.empty_share,
            "mean_hypothesis_length": self.mean_hypothesis_length,
        }


def count_errors(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> WerCounts:
    """Align each hypothesis with its reference and pool the errors over all clips.

    Takes one sequence of words a clip, in the same order; either may be empty. Words are compared whole and
    may hold any character. jiwer's Levenshtein alignment (costs 1/1/1) gives sclite's total of errors; the
    division into substitutions, deletions and insertions may differ from sclite's (costs 4/3/3).
    Raises ValueError for unequal numbers of clips, TypeError for a sentence that is a string.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses: one of each a clip")
    for sentence in (*references, *hypotheses):
        # A string is a sequence of strings too: its letters would be scored, silently.
        if isinstance(sentence, str):
            raise TypeError(f"expected a sequence of words, found the string {sentence!r}: split it first")
    output = jiwer.process_words(
        # jiwer declares sentences as strings, but takes whatever its transform turns into lists of words.
        cast("list[str]", [list(words) for words in references]),
        cast("list[str]", [list(words) for words in hypotheses]),
        reference_transform=_WORDS_AS_THEY_ARE,
        hypothesis_transform=_WORDS_AS_THEY_ARE,
    )
    return WerCounts(
        substitutions=output.substitutions,
        deletions=output.deletions,
        insertions=output.insertions,
        reference_words=sum(len(words) for words in references),
        hypothesis_words=sum(len(words) for words in hypotheses),
        clips=len(references),
        empty_hypotheses=sum(len(words) == 0 for words in hypotheses),
    )


class _WordsAsTheyAre(jiwer.AbstractTransform):
    """Hand lists of words to jiwer untouched: its defaults would join, strip and split them again."""

    def __call__(self, sentences: Any) -> Any:
        return sentences


_WORDS_AS_THEY_ARE = _WordsAsTheyAre()
