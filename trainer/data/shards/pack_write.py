"""Second pass of the packing: shards planned to the byte, then filled by several processes at known offsets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from trainer.data.features import read_features
from trainer.data.shards.encode import Encoding, encode
from trainer.data.shards.format import StorageType, map_columns, record_bytes, shard_name
from trainer.data.shards.pack_files import shard_header, write_at, write_tensors
from trainer.data.shards.pack_scan import Findings
from trainer.data.shards.pack_source import Source, checksum_file
from trainer.data.shards.pack_workers import WorkerPool
from trainer.errors import InputError
from trainer.files import sync_folder

_BYTES_PER_TASK = 16 << 20
_CLIPS_PER_TASK = 32


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard as it will be."""

    name: str
    split: str
    first: int
    """Place of its first clip in the split."""
    header: bytes
    offsets: npt.NDArray[np.int64]
    """Where each record begins, from the beginning of the file, `[N]`."""
    bytes: int
    """Size of the file."""

    @property
    def stop(self) -> int:
        """Return the place after its last clip."""
        return self.first + len(self.offsets)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the second pass knows of every clip, per split `[N]`: checksums of the records, and errors."""

    checksums: dict[str, npt.NDArray[np.uint64]]
    largest: float
    """Largest absolute error."""
    mean: float
    """Mean absolute error over all values."""
    in_deviations: float
    """Largest error in units of its dimension's standard deviation."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Some clips of one shard, end to end."""

    shard: int
    first: int
    path: Path
    offset: int
    sources: tuple[tuple[Path, int], ...]
    shapes: tuple[tuple[int, int], ...]
    encoding: Encoding
    inverse_spread: npt.NDArray[np.float32]


@dataclass(kw_only=True)
class _Records:
    """What came of a task's clips."""

    checksums: list[int] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    in_deviations: list[float] = field(default_factory=list)


def plan_shards(
    split: str, ids: Sequence[str], num_frames: Sequence[int], feature_dim: int, dtype: StorageType, limit: int
) -> list[Shard]:
    """Cut a split into shards of at most `limit` bytes of records; a larger clip has a shard of its own."""
    frames = np.asarray(num_frames, np.int64)
    sizes = record_bytes(frames, feature_dim, dtype)
    starts, held = [0], 0
    for place, size in enumerate(sizes.tolist()):
        if held and held + size > limit:
            starts.append(place)
            held = 0
        held += size
    shards = []
    for number, (first, stop) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
        header = shard_header(ids[first:stop], frames[first:stop], feature_dim, dtype)
        ends = len(header) + np.cumsum(sizes[first:stop])
        shards.append(
            Shard(
                name=shard_name(split, number),
                split=split,
                first=first,
                header=header,
                offsets=ends - sizes[first:stop],
                bytes=int(ends[-1]),
            )
        )
    return shards


def is_written(shard: Shard, state: Path, folder: Path) -> bool:
    """Tell whether an earlier attempt finished a shard."""
    path = folder / shard.name
    return _state_path(state, shard).is_file() and path.is_file() and path.stat().st_size == shard.bytes


def drop_unfinished(folder: Path) -> None:
    """Remove the shards that an earlier attempt began and has not finished."""
    for leftover in (folder / "shards").glob(".*"):
        leftover.unlink()


def write_shards(
    source: Source,
    findings: Findings,
    shards: Sequence[Shard],
    encoding: Encoding,
    inverse_spread: npt.NDArray[np.float32],
    *,
    state: Path,
    folder: Path,
    pool: WorkerPool,
    advance: Callable[[int], object],
) -> Written:
    """Write every shard that an earlier attempt has not finished; `advance` counts clips.

    Tasks are of at most 16 MiB of records or one clip, and a worker holds one clip at a time: its features, once more
    while they are read, and its record. Raises `InputError` for a source file that changed since the first pass.
    """
    state.mkdir(exist_ok=True)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    unfinished: dict[int, int] = {}
    records: dict[int, dict[int, _Records]] = {}

    def tasks() -> Iterator[_Task]:
        for number, shard in enumerate(shards):
            if is_written(shard, state, folder):
                advance(shard.stop - shard.first)
                continue
            path = _partial(folder, shard)
            _begin(path, shard)
            unfinished[number] = shard.stop - shard.first
            for first, stop in _cut(shard):
                clips = source.splits[shard.split][shard.first + first : shard.first + stop]
                known = findings.checksums[shard.split][shard.first + first : shard.first + stop].tolist()
                yield _Task(
                    shard=number,
                    first=first,
                    path=path,
                    offset=int(shard.offsets[first]),
                    sources=tuple((clip.source, checksum) for clip, checksum in zip(clips, known, strict=True)),
                    shapes=tuple((clip.num_frames, source.feature_dim) for clip in clips),
                    encoding=encoding,
                    inverse_spread=inverse_spread,
                )

    for task, result in pool.run(_write_task, tasks()):
        advance(len(task.sources))
        records.setdefault(task.shard, {})[task.first] = result
        unfinished[task.shard] -= len(task.sources)
        if not unfinished[task.shard]:
            parts = records.pop(task.shard)
            _finish(shards[task.shard], [parts[first] for first in sorted(parts)], state, folder)
    return _collect(source, shards, state)


def _cut(shard: Shard) -> Iterator[tuple[int, int]]:
    """Cut a shard's clips into tasks: places of the first, and after the last."""
    ends = np.append(shard.offsets[1:], shard.bytes)
    first = 0
    while first < len(ends):
        fits = int(np.searchsorted(ends, shard.offsets[first] + _BYTES_PER_TASK, side="right"))
        stop = min(max(fits, first + 1), first + _CLIPS_PER_TASK)
        yield first, stop
        first = stop


def _begin(path: Path, shard: Shard) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.ftruncate(descriptor, shard.bytes)
        write_at(descriptor, memoryview(shard.header), 0)
    finally:
        os.close(descriptor)


def _write_task(task: _Task) -> _Records:
    done = _Records()
    offset = task.offset
    descriptor = os.open(task.path, os.O_WRONLY)
    try:
        for (path, checksum), shape in zip(task.sources, task.shapes, strict=True):
            stored, error = encode(_read_unchanged(path, checksum, shape), task.encoding, task.inverse_spread)
            record = stored.data.cast("B")
            write_at(descriptor, record, offset)
            offset += len(record)
            done.checksums.append(xxhash.xxh3_64_intdigest(record))
            done.largest.append(error.largest)
            done.total.append(error.total)
            done.in_deviations.append(error.in_deviations)
        # Here, where others compute meanwhile; a whole shard at once would hold everybody up.
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    return done


def _read_unchanged(path: Path, checksum: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Read a clip that the first pass has checked."""
    mend = "let the extraction end first, then pack with --restart"
    try:
        _, found = checksum_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read any more ({error.strerror or error}); {mend}") from None
    if found == checksum:
        features = read_features(path, check_finite=False)
        if features.shape == shape:
            return features
    raise InputError(f"{path}: changed while it was being packed; {mend}")


def _finish(shard: Shard, parts: Sequence[_Records], state: Path, folder: Path) -> None:
    path = folder / shard.name
    descriptor = os.open(_partial(folder, shard), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _partial(folder, shard).replace(path)
    sync_folder(path.parent)
    write_tensors(
        _state_path(state, shard),
        {
            "checksums": np.array([value for part in parts for value in part.checksums], np.uint64),
            "largest": np.array([value for part in parts for value in part.largest], np.float64),
            "total": np.array([value for part in parts for value in part.total], np.float64),
            "in_deviations": np.array([value for part in parts for value in part.in_deviations], np.float64),
        },
    )


def _collect(source: Source, shards: Sequence[Shard], state: Path) -> Written:
    checksums = {split: np.empty(len(clips), np.uint64) for split, clips in source.splits.items()}
    largest = total = in_deviations = 0.0
    for shard in shards:
        columns = map_columns(_state_path(state, shard))
        checksums[shard.split][shard.first : shard.stop] = columns["checksums"]
        largest = max(largest, float(columns["largest"].max()))
        in_deviations = max(in_deviations, float(columns["in_deviations"].max()))
        total += float(columns["total"].sum())
    values = sum(clip.num_frames for clip in source.clips) * source.feature_dim
    return Written(checksums=checksums, largest=largest, mean=total / values, in_deviations=in_deviations)


def _state_path(state: Path, shard: Shard) -> Path:
    return state / Path(shard.name).name


def _partial(folder: Path, shard: Shard) -> Path:
    path = folder / shard.name
    return path.with_name(f".{path.name}.partial")
