"""Annotation files: which clips a split holds, who signs in them, and which glosses they show."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import InputError, name_some

FILE_NAMES = (
    "{split}.corpus.csv",
    "{split}.SI5.corpus.csv",
    "PHOENIX-2014-T.{split}.corpus.csv",
    "{split}.csv",
    "{split}.tsv",
)
"""Names looked for in an annotation directory, whatever their case."""

# Per role, the spellings in circulation; the first one present is taken.
_COLUMNS = {
    "id": ("id", "name"),
    "folder": ("folder", "video", "path"),
    "signer": ("signer", "speaker"),
    "glosses": ("annotation", "glosses", "gloss", "orth"),
    "num_frames": ("num_frames",),
}
_HEADERS = "`id|folder|signer|annotation`, `name|video|start|end|speaker|orth|translation` or `id,glosses`"
_MOST_PROBLEMS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One line of an annotation file."""

    id: str
    """Name of the clip, spelled as in the file; may hold sub-folders, never leaves the data directory."""
    folder: str
    """Where the corpus keeps the frames or the video; empty if the file has no such column."""
    signer: str
    """Who signs; empty if the file has no such column."""
    glosses: tuple[str, ...]
    """What is signed, at least one gloss."""
    line: int
    """Line in the file, the header being line 1."""
    num_frames: int | None = None
    """Frames of the clip's video; None if the file has no such column, or nothing in it."""


def find_annotation_file(annotations: str, split: str) -> Path:
    """Find the annotation file of one split.

    `annotations` is a directory that holds one of `FILE_NAMES`, or a pattern such as
    `ann/{split}.SI5.corpus.csv`. Raises `InputError` if no file, or more than one, answers.
    """
    path = Path(annotations.replace("{split}", split))
    mend = "give --annotations as a directory of one file per split, or as a pattern: ann/{split}.corpus.csv"
    if path.is_file():
        if "{split}" in annotations:
            return path
        raise InputError(
            f"annotations of split {split}: {path} is one file, which would serve every split alike; {mend}"
        )
    if not path.is_dir():
        raise InputError(f"annotations of split {split}: {path} does not exist; {mend}")
    wanted = [name.replace("{split}", split) for name in FILE_NAMES]
    # The directory is listed, since SI5 also circulates as si5 and some file systems ignore case.
    in_lower_case = {name.lower() for name in wanted}
    found = sorted(file for file in path.iterdir() if file.name.lower() in in_lower_case and file.is_file())
    if not found:
        raise InputError(f"annotations of split {split}: {path} holds none of {', '.join(wanted)}; add one, or {mend}")
    if len(found) > 1:
        pattern = path / found[0].name.replace(split, "{split}", 1)
        raise InputError(
            f"annotations of split {split}: expected one file in {path}, found "
            f"{', '.join(file.name for file in found)}; choose by a pattern, as in --annotations '{pattern}'"
        )
    return found[0]


def read_annotation_file(path: Path, *, allow_empty: bool = False) -> list[Annotation]:
    """Read an annotation file, in its order.

    The header gives the delimiter (`|`, tab or comma) and the columns: PHOENIX-2014, both spellings of
    PHOENIX-2014T, a plain `id,glosses`, and mixtures of their column names. Raises one `InputError` with
    every problem in the file (the first 50, and the count), each with its line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend the path or its rights") from None
    problems: list[str] = []
    lines = _decode_lines(path, content, problems)
    number, header = next(lines, (1, ""))
    if not header:
        found = f"an empty file; expected a header such as {_HEADERS} and one line per clip"
        raise InputError(problems or [f"{path}:1: {found}"])
    delimiter = next((mark for mark in "|\t," if mark in header), ",")
    columns = [name.strip().lower() for name in _split_line(header, delimiter)]
    roles = _find_roles(f"{path}:{number}", columns)

    annotations: dict[str, Annotation] = {}
    for number, line in lines:
        where = f"{path}:{number}"
        fields = _split_line(line, delimiter)
        if len(fields) != len(columns):
            mend = "quote a field that holds a comma" if delimiter == "," else "add or remove delimiters"
            problems.append(
                f"{where}: malformed line, expected {len(columns)} fields separated by {delimiter!r} as in "
                f"the header, found {len(fields)}: {line[:80]!r}; {mend}"
            )
            continue
        values = {role: fields[index].strip() for role, index in roles.items()}
        frames = values.get("num_frames", "")
        # A table with a gap in this column is often written with 120.0 for 120.
        whole = re.fullmatch(r"(\d+)(\.0*)?", frames)
        annotation = Annotation(
            id=values["id"],
            folder=values.get("folder", ""),
            signer=values.get("signer", ""),
            glosses=tuple(values["glosses"].split()),
            line=number,
            num_frames=int(whole[1]) if whole else None,
        )
        first = annotations.setdefault(annotation.id, annotation)
        if problem := _refuse_id(annotation.id):
            problems.append(f"{where}: {problem}")
        elif first is not annotation:
            problems.append(
                f"{where}: duplicate id {annotation.id}, first found on line {first.line}; every clip needs "
                f"an id of its own: remove or rename line {first.line} or line {number}"
            )
        if frames and not whole:
            problems.append(
                f"{where}: expected the number of frames in column `{columns[roles['num_frames']]}`, found {frames!r}; "
                "correct it, or leave it empty"
            )
        if unwritable := [gloss for gloss in annotation.glosses if gloss == "[EMPTY]" or gloss.startswith(";;")]:
            problems.append(
                f"{where}: gloss {unwritable[0]!r} means a missing word or a comment in scoring files (CTM, STM); "
                "rename the gloss"
            )
        if not annotation.glosses and not allow_empty:
            problems.append(
                f"{where}: empty annotation of clip {annotation.id}, expected at least one gloss in column "
                f"`{columns[roles['glosses']]}`; add its glosses or remove the line"
            )
    if not annotations and not problems:
        problems.append(f"{path}:{number}: expected one line per clip, found only the header; add the clips")
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"{path}: and {len(problems) - _MOST_PROBLEMS} more problems like these"]
    if problems:
        raise InputError(problems)
    return list(annotations.values())


def _decode_lines(path: Path, content: bytes, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the lines that are not blank; note those that are not UTF-8."""
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(
                f"{path}:{number}: expected UTF-8, found byte 0x{raw[error.start]:02x} at position "
                f"{error.start + 1} of the line; convert the file, as in `iconv -f LATIN1 -t UTF-8`"
            )
            if number == 1:
                return
            continue
        if line.strip():
            yield number, line


def _find_roles(where: str, columns: list[str]) -> dict[str, int]:
    """Map each role that the header knows to the index of its column."""
    problems = []
    roles = {}
    for role, spellings in _COLUMNS.items():
        present = [name for name in spellings if name in columns]
        if present:
            roles[role] = columns.index(present[0])
        elif role in ("id", "glosses"):
            problems.append(
                f"{where}: expected a header with a column {' or '.join(f'`{name}`' for name in spellings)}, "
                f"found the columns {name_some(columns)}; give the file a header such as {_HEADERS}"
            )
        # Choosing among transcripts for the user could train on the wrong one without a word.
        ambiguous = role == "glosses" and len(present) > 1
        if ambiguous or any(columns.count(name) > 1 for name in present):
            problems.append(
                f"{where}: expected one column for the {role}, found "
                f"{', '.join(name for name in columns if name in present)}; rename all but one"
            )
    if problems:
        raise InputError(problems)
    return roles


def _split_line(line: str, delimiter: str) -> list[str]:
    """Split a line into fields; none if its quotes do not match."""
    # Only comma files quote: PHOENIX leaves the quotation marks of its translations as they are.
    if delimiter != ",":
        return line.split(delimiter)
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error:
        return []


def _refuse_id(clip_id: str) -> str | None:
    """Say why a clip cannot have this id, or return None."""
    if not clip_id:
        return "empty id, expected the name of a clip; fill it in or remove the line"
    if any(part in {"", ".", ".."} for part in re.split(r"[/\\]", clip_id)):
        return f"id {clip_id!r} leaves the split's folder, expected a relative path without `..`; mend the id"
    # CTM and STM separate their columns by white space.
    if not clip_id.isprintable() or " " in clip_id:
        return f"id {clip_id!r} holds white space or control characters, which CTM cannot hold; mend the id"
    return None
