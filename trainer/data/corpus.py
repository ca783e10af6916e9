"""The corpus: annotations joined with feature files into clips, without reading any features."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.data.annotations import Annotation, find_annotation_file, read_annotation_file
from trainer.data.features import feature_paths, peek_shape
from trainer.errors import InputError, name_some

# Reading a header is waiting for the file system: milliseconds on network storage.
_READER_THREADS = 8
_MOST_BAD_FILES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One clip of a split."""

    id: str
    """Name of the clip, unique in its split."""
    split: str
    """Name of the split, and of its folder."""
    signer: str
    """Who signs; empty if unknown."""
    num_frames: int
    """Number of feature frames, T."""
    glosses: tuple[str, ...]
    """What is signed."""
    source: Path
    """The feature file."""


def min_output_frames(glosses: Sequence[object]) -> int:
    """Return the fewest output frames in which CTC can emit `glosses` (or their classes).

    One frame a gloss, and one for the blank between adjacent repeats (Graves et al. 2006).
    """
    return len(glosses) + sum(first == second for first, second in pairwise(glosses))


def clip_digest(clip_id: str, num_frames: int, glosses: Sequence[str]) -> int:
    """Hash what the plan and the loss know of a clip to 64 bits: whether a corpus is still the same."""
    row = json.dumps([clip_id, num_frames, list(glosses)]).encode()
    return int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little")


def read_split(
    data_dir: Path,
    annotations: str,
    split: str,
    *,
    allow_missing: bool,
    log: Callable[[str], None],
    expected_dim: int | None = None,
) -> list[Clip]:
    """Join the annotations of one split with its feature files, in the order of the annotation file.

    Reads no more than the files' headers. `annotations` is what `find_annotation_file` takes;
    `expected_dim` holds the other splits to the D of the training split. With `allow_missing`, clips
    without a feature file are dropped and named through `log`, as feature files without an annotation
    always are. Raises one `InputError` with every problem found.
    """
    problems: list[str] = []
    lines: list[Annotation] = []
    try:
        lines = read_annotation_file(find_annotation_file(annotations, split))
    except InputError as error:
        problems += error.problems
    folder = data_dir / split
    present = set(folder.rglob("*.npz"))
    sources = {line.id: _find_source(data_dir, split, line.id, present) for line in lines}
    joined = [(line, source) for line in lines if (source := sources[line.id])]
    if not present and not joined:
        found = "an empty folder" if folder.is_dir() else "no such folder"
        raise InputError(
            [
                *problems,
                f"{folder}: expected the feature files <id>.npz of split {split}, found {found}; extract the "
                "features there, or mend --data_dir",
            ]
        )

    if missing := [line for line in lines if sources[line.id] is None]:
        named = name_some([f"{line.id} (line {line.line})" for line in missing])
        what = f"{folder}: {len(missing)} of {len(lines)} annotated clips have no feature file: {named}"
        if allow_missing and joined:
            log(f"{what}; dropped, as --allow_missing says")
        else:
            example = feature_paths(data_dir, split, missing[0].id)[0]
            mend = "or drop them with --allow_missing" if joined else "or the ids, none of which has a file"
            problems.append(f"{what}; expected {example}, for one; extract them, mend --data_dir, {mend}")
    extra = present.difference(source for _, source in joined)
    if lines and extra:
        names = name_some(sorted(str(path.relative_to(folder)) for path in extra), limit=3)
        log(f"{folder}: {len(extra)} feature files without an annotation are left out: {names}")
    problems += _find_shared(joined)
    # Without annotations the files can still be checked, so that one run shows all there is to mend.
    paths = [source for _, source in joined] if lines else sorted(present)
    shapes, bad_files = _peek_all(folder, paths)
    problems += bad_files + _find_other_dims(folder, shapes, expected_dim)
    if problems:
        raise InputError(problems)
    return [
        Clip(
            id=line.id,
            split=split,
            signer=line.signer,
            num_frames=shapes[source][0],
            glosses=line.glosses,
            source=source,
        )
        for line, source in joined
    ]


def feature_dim(clips: Sequence[Clip]) -> int:
    """Return D of a split that `read_split` returned."""
    return peek_shape(clips[0].source)[1]


def _find_source(data_dir: Path, split: str, clip_id: str, present: set[Path]) -> Path | None:
    """Return the clip's feature file; None if there is none."""
    # The listing spares a file-system call per clip, but does not follow links to folders.
    paths = feature_paths(data_dir, split, clip_id)
    return next((path for path in paths if path in present or path.is_file()), None)


def _find_shared(joined: Sequence[tuple[Annotation, Path]]) -> list[str]:
    """Describe the annotations that lead to a feature file another one has: `x` and `train/x`, say."""
    first: dict[Path, Annotation] = {}
    return [
        f"{source}: expected to serve one clip, found two: {other.id} (line {other.line}) and {line.id} "
        f"(line {line.line}); remove or rename one of them"
        for line, source in joined
        if (other := first.setdefault(source, line)) is not line
    ]


def _peek_all(folder: Path, paths: Sequence[Path]) -> tuple[dict[Path, tuple[int, int]], list[str]]:
    """Return (T, D) of every readable feature file, and what is wrong with the others."""

    def peek(path: Path) -> tuple[int, int] | str:
        try:
            return peek_shape(path)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(_READER_THREADS) as pool:
        results = dict(zip(paths, pool.map(peek, paths), strict=True))
    problems = [result for result in results.values() if isinstance(result, str)]
    if len(problems) > _MOST_BAD_FILES:
        more = f"{folder}: and {len(problems) - _MOST_BAD_FILES} more bad files ({len(problems)} in all)"
        problems = [*problems[:_MOST_BAD_FILES], more]
    return {path: result for path, result in results.items() if isinstance(result, tuple)}, problems


def _find_other_dims(folder: Path, shapes: dict[Path, tuple[int, int]], expected_dim: int | None) -> list[str]:
    """Describe the feature files whose D differs from `expected_dim`, or else from most of them."""
    if not shapes:
        return []
    expected, count = Counter(dim for _, dim in shapes.values()).most_common(1)[0]
    reason = f"as in {count} of {len(shapes)} files"
    if expected_dim is not None:
        expected, reason = expected_dim, "as in the training split"
    others = [f"{path.relative_to(folder)} (D = {dim})" for path, (_, dim) in shapes.items() if dim != expected]
    if not others:
        return []
    return [
        f"{folder}: expected D = {expected}, {reason}, found another D in {len(others)}: "
        f"{name_some(others)}; extract them anew with the settings of the others"
    ]
