"""First pass of the packing: every clip read and checked in full, in chunks whose findings are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.features import Moments, moments_of, read_features
from trainer.data.shards.encode import HALF_MAX, find_overflow
from trainer.data.shards.format import Columns, map_columns
from trainer.data.shards.pack_files import write_tensors
from trainer.data.shards.pack_source import Source, checksum_file
from trainer.data.shards.pack_workers import WorkerPool
from trainer.errors import InputError

CHUNK = 64
"""Clips whose moments are merged before the chunks are: as many as `trainer.data.prepare` takes, for the same bits."""
_CLIPS_PER_TASK = 8
_MOST_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the first pass knows of the corpus."""

    bytes: dict[str, npt.NDArray[np.int64]]
    """Size of every source file, per split `[N]`."""
    checksums: dict[str, npt.NDArray[np.uint64]]
    """xxh3-64 of every source file, per split `[N]`."""
    moments: Moments
    """Moments of the training split."""
    minimum: npt.NDArray[np.float32]
    """Smallest value per dimension over all splits, `[D]`."""
    maximum: npt.NDArray[np.float32]
    """Largest value per dimension over all splits, `[D]`."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Some clips of one chunk: their files and frames."""

    split: str
    chunk: int
    part: int
    files: tuple[tuple[Path, int], ...]
    dim: int
    gather: bool
    half: bool


@dataclass(kw_only=True)
class _Part:
    """What a worker found in a task's clips."""

    bytes: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    moments: list[Moments] = field(default_factory=list)
    minimum: npt.NDArray[np.float32] | None = None
    maximum: npt.NDArray[np.float32] | None = None
    problems: list[str] = field(default_factory=list)


def scan(source: Source, state: Path, pool: WorkerPool, *, half: bool, advance: Callable[[int], object]) -> Findings:
    """Read every clip that is not yet in `state`, and gather what all of them hold.

    `half` refuses values that float16 cannot hold; `advance` counts clips. A worker keeps one clip in memory, twice at
    the most while it is read. Raises one `InputError` for all bad files, the first ten by name, after all were read.
    """
    state.mkdir(exist_ok=True)
    order = {split: place for place, split in enumerate(source.splits)}
    problems: dict[tuple[int, int, int], list[str]] = {}
    parts: dict[tuple[str, int], dict[int, _Part]] = {}
    for task, part in pool.run(_scan_task, _list_tasks(source, state, half, advance)):
        advance(len(task.files))
        if part.problems:
            problems[order[task.split], task.chunk, task.part] = part.problems
        key = task.split, task.chunk
        whole = parts.setdefault(key, {})
        whole[task.part] = part
        clips_of_chunk = min(CHUNK, len(source.splits[task.split]) - task.chunk * CHUNK)
        if len(whole) == -(-clips_of_chunk // _CLIPS_PER_TASK):
            del parts[key]
            if not any(piece.problems for piece in whole.values()):
                write_tensors(_chunk_path(state, *key), _merge([whole[place] for place in sorted(whole)]))
    if problems:
        found = [problem for key in sorted(problems) for problem in problems[key]]
        more = len(found) - _MOST_PROBLEMS
        raise InputError(
            found[:_MOST_PROBLEMS] + ([f"and {more} more bad files ({len(found)} in all)"] if more > 0 else [])
        )
    return _collect(source, state)


def _list_tasks(source: Source, state: Path, half: bool, advance: Callable[[int], object]) -> Iterator[_Task]:
    """List what is left to do; counts what is not."""
    for split, clips in source.splits.items():
        for start in range(0, len(clips), CHUNK):
            chunk = clips[start : start + CHUNK]
            if _chunk_path(state, split, start // CHUNK).is_file():
                advance(len(chunk))
                continue
            for first in range(0, len(chunk), _CLIPS_PER_TASK):
                yield _Task(
                    split=split,
                    chunk=start // CHUNK,
                    part=first // _CLIPS_PER_TASK,
                    files=tuple((c.source, c.num_frames) for c in chunk[first : first + _CLIPS_PER_TASK]),
                    dim=source.feature_dim,
                    gather=split == "train",
                    half=half,
                )


def _scan_task(task: _Task) -> _Part:
    part = _Part()
    minima, maxima = [], []
    for path, num_frames in task.files:
        try:
            features = _read_checked(path, (num_frames, task.dim), half=task.half)
            size, checksum = checksum_file(path)
        except InputError as error:
            part.problems += error.problems
            continue
        except OSError as error:
            part.problems.append(f"{path}: cannot be read ({error.strerror or error}); mend the path or its rights")
            continue
        part.bytes.append(size)
        part.checksums.append(checksum)
        minima.append(features.min(axis=0))
        maxima.append(features.max(axis=0))
        if task.gather:
            part.moments.append(moments_of(features))
    if minima:
        part.minimum, part.maximum = np.min(minima, axis=0), np.max(maxima, axis=0)
    return part


def _read_checked(path: Path, shape: tuple[int, int], *, half: bool) -> npt.NDArray[np.float32]:
    features = read_features(path)
    if features.shape != shape:
        raise InputError(
            f"{path}: expected shape {list(shape)} as when the packing began, found {list(features.shape)}; let the "
            "extraction end first, then pack with --restart"
        )
    if half and (place := find_overflow(features)) is not None:
        frame, dimension = place
        raise InputError(
            f"{path}: expected values of at most {HALF_MAX:g}, which float16 can hold, found {features[place]:g} at "
            f"frame {frame}, dimension {dimension} (counted from 0); drop --scaling none, or pack with --dtype float32"
        )
    return features


def _merge(parts: list[_Part]) -> Columns:
    columns: dict[str, Any] = {
        "bytes": np.array([size for part in parts for size in part.bytes], np.int64),
        "checksums": np.array([checksum for part in parts for checksum in part.checksums], np.uint64),
        "minimum": np.min([part.minimum for part in parts if part.minimum is not None], axis=0),
        "maximum": np.max([part.maximum for part in parts if part.maximum is not None], axis=0),
    }
    merged: Moments | None = None
    for moments in (moments for part in parts for moments in part.moments):
        merged = moments if merged is None else merged.merge(moments)
    if merged is not None:
        columns |= {"count": np.array([merged.count], np.int64), "mean": merged.mean, "m2": merged.m2}
    return columns


def _collect(source: Source, state: Path) -> Findings:
    """Merge the chunks' findings, one file after the other: those of a large corpus do not fit in memory together."""
    sizes: dict[str, npt.NDArray[np.int64]] = {}
    checksums: dict[str, npt.NDArray[np.uint64]] = {}
    total: Moments | None = None
    minimum = np.full(source.feature_dim, np.inf, np.float32)
    maximum = np.full(source.feature_dim, -np.inf, np.float32)
    for split, clips in source.splits.items():
        sizes[split] = np.empty(len(clips), np.int64)
        checksums[split] = np.empty(len(clips), np.uint64)
        for start in range(0, len(clips), CHUNK):
            columns = map_columns(_chunk_path(state, split, start // CHUNK))
            sizes[split][start : start + CHUNK] = columns["bytes"]
            checksums[split][start : start + CHUNK] = columns["checksums"]
            np.minimum(minimum, columns["minimum"], out=minimum)
            np.maximum(maximum, columns["maximum"], out=maximum)
            if split == "train":
                moments = Moments(count=int(columns["count"][0]), mean=columns["mean"], m2=columns["m2"])
                total = moments if total is None else total.merge(moments)
    assert total is not None
    return Findings(bytes=sizes, checksums=checksums, moments=total, minimum=minimum, maximum=maximum)


def _chunk_path(state: Path, split: str, chunk: int) -> Path:
    return state / f"{split}-{chunk:06d}.safetensors"
