"""The vocabulary: which class of the CTC head stands for which gloss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.errors import InputError, name_some
from trainer.files import write_json

BLANK = 0
"""Class of the CTC blank. It has no spelling, so that no gloss can be mistaken for it."""


class UnknownGlossError(LookupError):
    """A gloss that the training split does not hold was to be encoded."""


class Vocabulary:
    """The glosses of the training split, in code-point order, as classes 1 … V-1; class 0 is the blank."""

    def __init__(self, glosses: Iterable[str]) -> None:
        self.glosses: tuple[str, ...] = tuple(sorted(set(glosses)))
        """All glosses; the class of `glosses[i]` is `i + 1`."""
        if not self.glosses or "" in self.glosses:
            raise ValueError("a vocabulary needs at least one gloss and no empty one")
        self._classes = {gloss: index for index, gloss in enumerate(self.glosses, start=1)}

    @classmethod
    def build(cls, sequences: Iterable[Sequence[str]]) -> Vocabulary:
        """Collect the glosses of the training clips."""
        return cls(gloss for glosses in sequences for gloss in glosses)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a vocabulary that `save` wrote.

        Raises `InputError` if the file is missing, is no vocabulary, or changed since it was written.
        """
        mend = "restore it from a backup of the run, or train anew"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            glosses, fingerprint = stored["glosses"], stored["fingerprint"]
            vocabulary = cls(glosses)
        except OSError as error:
            raise InputError(f"{path}: vocabulary cannot be read ({error.strerror}); {mend}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: expected a vocabulary as JSON, found a damaged file; {mend}") from None
        if list(vocabulary.glosses) != glosses or vocabulary.fingerprint != fingerprint:
            raise InputError(
                f"{path}: expected the vocabulary with fingerprint {str(fingerprint)[:12]}…, found "
                f"{vocabulary.fingerprint[:12]}…, so the file changed after the run wrote it; {mend}"
            )
        return vocabulary

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON; the file appears complete or not at all."""
        write_json(path, {"blank": BLANK, "fingerprint": self.fingerprint, "glosses": self.glosses})

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the glosses in their order, as hexadecimal digits."""
        # As JSON, since joining the glosses by any character would let two vocabularies look alike.
        return hashlib.sha256(json.dumps(self.glosses).encode("ascii")).hexdigest()

    def encode(self, glosses: Sequence[str]) -> list[int]:
        """Turn glosses into classes; raises `UnknownGlossError` rather than let one become blank."""
        unknown = self.unknown(glosses)
        if unknown:
            raise UnknownGlossError(f"glosses that the training split does not hold: {name_some(sorted(unknown))}")
        return [self._classes[gloss] for gloss in glosses]

    def decode(self, classes: Iterable[int]) -> list[str]:
        """Turn classes into glosses; raises `ValueError` for the blank, which a decoder has to remove."""
        ids = [int(index) for index in classes]
        for index in ids:
            if not BLANK < index < len(self):
                raise ValueError(f"class {index} stands for no gloss; expected 1 to {len(self) - 1}")
        return [self.glosses[index - 1] for index in ids]

    def unknown(self, glosses: Iterable[str]) -> set[str]:
        """Return those glosses that have no class."""
        return {gloss for gloss in glosses if gloss not in self._classes}

    def check_same(self, other: Vocabulary, where: str) -> None:
        """Raise `InputError` if `other`, found at `where`, gives classes another meaning than this one."""
        if self.glosses == other.glosses:
            return
        sides = {"missing there": other.unknown(self.glosses), "only there": self.unknown(other.glosses)}
        differences = "; ".join(
            f"{len(glosses)} {side}: {name_some(sorted(glosses))}" for side, glosses in sides.items() if glosses
        )
        raise InputError(
            f"{where}: expected the {len(self.glosses)} glosses of this run, found another vocabulary "
            f"of {len(other.glosses)} ({differences}); use the annotations it was trained with, or train anew"
        )

    def __len__(self) -> int:
        """Number of classes, the blank included."""
        return len(self.glosses) + 1

    def __contains__(self, gloss: str) -> bool:
        return gloss in self._classes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.glosses == other.glosses

    def __hash__(self) -> int:
        return hash(self.glosses)
