"""Language models over glosses: n-grams with backoff, read from ARPA files.

An own reader of a page, because the usual library (kenlm) has no wheels: it compiles at installation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError, name_some
from trainer.scoring.ctm_stm import numbered_lines

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
State = tuple[str, ...]
"""The words that the next one depends on, the last one last; at most one less than the order."""

_COUNT = re.compile(r"ngram\s+(\d+)\s*=\s*(\d+)")
_LN10 = math.log(10.0)
_LN_NEVER = -99.0 * _LN10
"""What toolkits write for the words that are never predicted, such as `<s>`."""
_CACHED_STATES = 4096
_MEND = "write it anew with the toolkit it came from, as plain text"


class LanguageModel:
    """A backoff n-gram model as tables over the classes of a vocabulary; all scores are natural logarithms."""

    def __init__(
        self, probabilities: dict[State, float], backoffs: dict[State, float], *, order: int, glosses: Sequence[str]
    ) -> None:
        """Take n-grams and backoff weights by their words; `glosses[i]` is class i + 1, and `</s>` takes class 0.

        A gloss that the model does not hold counts as `<unk>`, or, where there is none, as the model's rarest word.
        """
        self.order = order
        self.unknown = [gloss for gloss in glosses if (gloss,) not in probabilities]
        """Glosses that the model does not hold."""
        missing = set(self.unknown)
        self._words = [END, *(UNKNOWN if gloss in missing else gloss for gloss in glosses)]
        self._backoffs = backoffs
        classes: dict[str, list[int]] = {}
        for index, word in enumerate(self._words):
            classes.setdefault(word, []).append(index)
        rarest = min((p for (word, *more), p in probabilities.items() if not more and p > _LN_NEVER), default=_LN_NEVER)
        base = np.full(len(self._words), rarest)
        listed: dict[State, tuple[list[int], list[float]]] = {}
        for (*context, word), score in probabilities.items():
            found = classes.get(word, [])
            if not context:
                base[found] = score
            elif found:
                indices, scores = listed.setdefault(tuple(context), ([], []))
                indices += found
                scores += [score] * len(found)
        self._base = base
        self._listed = {context: (np.array(i), np.array(s)) for context, (i, s) in listed.items()}
        self.scores = lru_cache(maxsize=_CACHED_STATES)(self._scores)
        """Return ln P(class | state) of all classes, `[V]`; class 0 is the end of the sentence. Not to be changed."""

    @property
    def start(self) -> State:
        """Return the state before the first gloss."""
        return (START,)[: self.order - 1]

    def advance(self, state: State, label: int) -> State:
        """Return the state after one more gloss."""
        return (*state, self._words[label])[-(self.order - 1) :] if self.order > 1 else ()

    def _scores(self, state: State) -> npt.NDArray[np.float64]:
        if not state:
            return self._base
        scores: npt.NDArray[np.float64] = self.scores(state[1:]) + self._backoffs.get(state, 0.0)
        if state in self._listed:
            classes, listed = self._listed[state]
            scores[classes] = listed
        return scores


def read_arpa(path: Path, glosses: Sequence[str]) -> LanguageModel:
    """Read an ARPA file for the glosses of a vocabulary, `glosses[i]` being class i + 1.

    Raises `InputError` with the first line that is wrong, for a file that is cut short, and for one that has no
    gloss in common with the vocabulary.
    """
    lines = numbered_lines(path)
    counts = _read_counts(path, lines)
    probabilities: dict[State, float] = {}
    backoffs: dict[State, float] = {}
    size, listed, number = 1, 0, 0
    for number, line in lines:
        where = f"{path}:{number}"
        if line.startswith("\\"):
            if listed != counts[size - 1]:
                raise InputError(
                    f"{where}: expected {counts[size - 1]} {size}-grams before this line, found {listed}; {_MEND}"
                )
            if size == len(counts):
                _expect(where, line, "\\end\\")
                break
            size, listed = size + 1, 0
            _expect(where, line, f"\\{size}-grams:")
            continue
        words, probability, backoff = _read_ngram(where, line, size)
        if words in probabilities:
            raise InputError(f"{where}: {' '.join(words)!r} was listed before; keep one of the lines")
        stray = [word for word in words if size > 1 and (word,) not in probabilities]
        if stray:
            raise InputError(f"{where}: {stray[0]!r} is not among the 1-grams; {_MEND}")
        probabilities[words] = probability
        if backoff:
            backoffs[words] = backoff
        listed += 1
    else:
        raise InputError(
            f"{path}:{number}: expected \\end\\ after this line, found the end of the file: it is cut short; {_MEND}"
        )
    model = LanguageModel(probabilities, backoffs, order=len(counts), glosses=glosses)
    if len(model.unknown) == len(glosses):
        raise InputError(
            f"{path}: holds none of the {len(glosses)} glosses of the vocabulary (e.g. {name_some(glosses, 5)}); make "
            "the language model from the glosses of the training annotations, spelled as they are there"
        )
    return model


def _read_counts(path: Path, lines: Iterator[tuple[int, str]]) -> list[int]:
    """Read the head of the file up to `\\1-grams:`; return how many n-grams there are of each order."""
    counts: list[int] = []
    in_head = False
    for number, line in lines:
        where = f"{path}:{number}"
        if not in_head:
            # Toolkits may write whatever they like before the head.
            in_head = line.strip() == "\\data\\"
            continue
        if line.startswith("\\"):
            _expect(where, line, "\\1-grams:" if counts else "ngram 1=COUNT")
            return counts
        match = _COUNT.fullmatch(line.strip())
        if match is None or int(match[1]) != len(counts) + 1:
            raise InputError(f"{where}: expected 'ngram {len(counts) + 1}=COUNT', found {line.strip()[:80]!r}; {_MEND}")
        counts.append(int(match[2]))
    raise InputError(
        f"{path}: expected an ARPA file with \\data\\ and \\1-grams:, found neither in this order; {_MEND}"
    )


def _read_ngram(where: str, line: str, size: int) -> tuple[State, float, float]:
    """Read `log10(p) word … word [log10(backoff)]`."""
    fields = line.split()
    problem = f"{where}: expected 'log10(p) {'word ' * size}[log10(backoff)]', found {line.strip()[:80]!r}; {_MEND}"
    if len(fields) not in (size + 1, size + 2):
        raise InputError(problem)
    try:
        probability = float(fields[0])
        backoff = float(fields[size + 1]) if len(fields) == size + 2 else 0.0
    except ValueError:
        raise InputError(problem) from None
    if not -math.inf < probability <= 0.0 or not math.isfinite(backoff):
        raise InputError(
            f"{where}: expected log10 of a probability, 0 or less and finite, found {line.strip()[:80]!r}; {_MEND}"
        )
    return tuple(fields[1 : size + 1]), probability * _LN10, backoff * _LN10


def _expect(where: str, line: str, expected: str) -> None:
    if line.strip() != expected:
        raise InputError(f"{where}: expected {expected}, found {line.strip()[:80]!r}; {_MEND}")
