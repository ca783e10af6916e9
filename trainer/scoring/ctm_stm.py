"""CTM (hypotheses) and STM (references), the files of NIST's sclite, in PHOENIX-2014's spelling.

STM: `id channel signer start end GLOSS GLOSS ...`, one line a clip.
CTM: `id channel start duration GLOSS [confidence]`, one line a word.
Times are seconds; `;;` starts a comment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import InputError
from trainer.files import unfenced, write_text

EMPTY_WORD = "[EMPTY]"
"""What PHOENIX-2014's own tools write for a clip without words; read as no word, never written here."""

OPEN_END = 1.79769e308
"""End time of a reference whose length is not known, as PHOENIX-2014's references have it."""

_SLOT = 0.01  # seconds
_PROBLEMS_SHOWN = 10
_NO_WORDS_LINE = ";; no hypothesis has a word"

Transcripts = dict[str, list[str]]
"""Words of each clip by its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StmRow:
    """Hold one reference."""

    id: str
    """Clip id, without white space."""
    glosses: Sequence[str]
    """Reference words; may be empty."""
    signer: str = "unknown"
    """Signer's name, without white space."""
    start: float = 0.0
    """Start in seconds."""
    end: float = OPEN_END
    """End in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CtmRow:
    """Hold one word of a hypothesis."""

    id: str
    """Clip id, without white space."""
    gloss: str
    """The word, without white space."""
    start: float
    """Start in seconds from the clip's beginning."""
    duration: float
    """Duration in seconds."""
    confidence: float | None = None
    """Confidence 0..1, if there is one."""


def untimed_ctm_rows(clip_id: str, glosses: Iterable[str]) -> list[CtmRow]:
    """Lay words whose times are not known out in order, 10 ms each."""
    return [CtmRow(id=clip_id, gloss=gloss, start=i * _SLOT, duration=_SLOT) for i, gloss in enumerate(glosses)]


def read_transcripts(path: Path, read_csv: Callable[[Path], Transcripts] | None = None) -> Transcripts:
    """Read transcripts by the file's extension: .stm, .ctm, and .csv where the caller brings a reader for it.

    Raises InputError for another extension and whatever the reader raises.
    """
    readers: dict[str, Callable[[Path], Transcripts]] = {".stm": read_stm, ".ctm": read_ctm}
    if read_csv is not None:
        readers[".csv"] = read_csv
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a file ending in {', '.join(readers)}, found {path.suffix!r}")
    return reader(path)


def read_stm(path: Path) -> Transcripts:
    """Read references: words by clip id, in the file's order.

    Raises InputError for a file that is missing, empty or not UTF-8, a malformed line, a duplicate id.
    """
    transcripts: Transcripts = {}
    first_seen: dict[str, int] = {}
    problems: list[str] = []
    for number, line in numbered_lines(path):
        fields = line.split()
        if len(fields) < 5 or not _are_times(*fields[3:5]):
            expected = "'id channel signer start end GLOSS ...' with times in seconds"
            problems.append(f"{path}:{number}: expected {expected}, found {_shorten(line)}")
            continue
        clip_id = fields[0]
        if clip_id in first_seen:
            problems.append(f"{path}:{number}: duplicate id {clip_id}, first in line {first_seen[clip_id]}: keep one")
            continue
        first_seen[clip_id] = number
        transcripts[clip_id] = fields[5:]
    _raise_if_any(problems)
    if not transcripts:
        raise InputError(f"{path}: expected one line a clip, found only comments")
    return transcripts


def read_ctm(path: Path) -> Transcripts:
    """Read hypotheses: words by clip id, each clip's sorted by start time (equal times keep their order).

    A clip whose id does not occur has an empty hypothesis; so has one whose only word is `[EMPTY]`. A file of
    comments alone says that no clip has a word. Raises InputError for a file that is missing, empty or not
    UTF-8, and for a malformed line.
    """
    timed: dict[str, list[tuple[float, str]]] = {}
    problems: list[str] = []
    for number, line in numbered_lines(path):
        fields = line.split()
        if len(fields) not in (5, 6) or not _are_times(*fields[2:4], *fields[5:]):
            expected = "'id channel start duration GLOSS [confidence]', one word a line and times in seconds"
            problems.append(f"{path}:{number}: expected {expected}, found {_shorten(line)}")
            continue
        words = timed.setdefault(fields[0], [])
        if fields[4] != EMPTY_WORD:
            words.append((float(fields[2]), fields[4]))
    _raise_if_any(problems)
    return {
        clip_id: [gloss for _, gloss in sorted(words, key=lambda word: word[0])] for clip_id, words in timed.items()
    }


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a text file, without blank lines and `;;` comments.

    Raises InputError for a file that is missing, unreadable, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found byte {error.start} that is not") from None
    if not text.strip():
        raise InputError(f"{path}: empty file")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith(";;"):
            yield number, line


def write_stm(path: Path, rows: Iterable[StmRow], *, fence: Callable[[], None] = unfenced) -> None:
    """Write references; ValueError for a name or gloss the format cannot hold, or a duplicate id."""
    lines: list[str] = []
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"duplicate id {row.id!r}: a reference is written once")
        seen.add(row.id)
        tokens = _checked(row.id, row.signer, *row.glosses)
        # Six digits like the corpus's own file; the open end then reads 1.79769e+308, letter for letter.
        lines.append(" ".join([tokens[0], "1", tokens[1], f"{row.start:.6g}", f"{row.end:.6g}", *tokens[2:]]))
    write_text(path, _text(lines), fence=fence)


def write_ctm(path: Path, rows: Iterable[CtmRow], *, fence: Callable[[], None] = unfenced) -> None:
    """Write hypotheses; a clip without words has no line. ValueError for what the format cannot hold."""
    lines: list[str] = []
    for row in rows:
        clip_id, gloss = _checked(row.id, row.gloss)
        # Zero-padded, because PHOENIX-2014's script sorts start times as text: 10.2 would precede 9.8.
        line = f"{clip_id} 1 {row.start:08.3f} {row.duration:.3f} {gloss}"
        lines.append(line if row.confidence is None else f"{line} {row.confidence:.4f}")
    # An empty file is what a crash leaves behind; a model that says nothing must be told from it.
    write_text(path, _text(lines or [_NO_WORDS_LINE]), fence=fence)


def _are_times(*fields: str) -> bool:
    try:
        return all(math.isfinite(float(field)) for field in fields)
    except ValueError:
        return False


def _checked(*tokens: str) -> tuple[str, ...]:
    """Pass tokens through that survive a round trip through a line of words."""
    for token in tokens:
        if token.split() != [token] or token == EMPTY_WORD or token.startswith(";;"):
            raise ValueError(f"{token!r} cannot be written: a name or gloss has no white space, is not empty")
    return tokens


def _shorten(line: str, limit: int = 80) -> str:
    line = line.strip()
    return repr(line if len(line) <= limit else line[: limit - 3] + "...")


def _raise_if_any(problems: list[str]) -> None:
    """Report malformed lines together, the first ten of them: a wrong file has one on every line."""
    if len(problems) > _PROBLEMS_SHOWN:
        problems = [*problems[:_PROBLEMS_SHOWN], f"and {len(problems) - _PROBLEMS_SHOWN} more such lines"]
    if problems:
        raise InputError(problems)


def _text(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)
