"""A packed corpus read back in full: held against its own checksums, and against its source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from trainer.data.features import read_features
from trainer.data.shards.encode import Encoding, decode, largest_excess
from trainer.data.shards.format import record_bytes
from trainer.data.shards.pack_files import shard_header
from trainer.data.shards.pack_listing import REPAIR, Listing, PackedClip, SourceClip
from trainer.data.shards.pack_source import checksum_file
from trainer.data.shards.pack_workers import WorkerPool
from trainer.data.shards.store import LocalStore
from trainer.errors import InputError

_CLIPS_PER_TASK = 16
_MOST_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a verification has compared, without finding anything."""

    files: int
    clips: int
    values: int
    worst: float
    """Largest error in units of its bound; 0 for float32."""


def verify(
    packed: Listing, sources: dict[str, list[SourceClip]], pool: WorkerPool, advance: Callable[[int], object]
) -> Verified:
    """Read every record back, compare its checksum, and its values with the source.

    float32 must be equal to the bit, float16 within the bound of `trainer.data.shards.encode`. A worker holds one
    clip at a time. Raises one `InputError` that names clips and shards, the first ten and how many more.
    """
    problems = _check_shards(packed)
    tasks = list(_list_tasks(packed, sources))
    results: dict[int, _Report] = {}
    for task, report in pool.run(functools.partial(_verify_task, packed.encoding), tasks):
        advance(len(task.clips))
        results[task.number] = report
    found = [problem for number in sorted(results) for problem in results[number].problems]
    if len(found) > _MOST_PROBLEMS:
        more = f"{packed.folder}: and {len(found) - _MOST_PROBLEMS} more clips like these ({len(found)} in all)"
        found = [*found[:_MOST_PROBLEMS], more]
    if problems or found:
        raise InputError([*problems, *found])
    clips = [clip for split in packed.splits.values() for clip in split]
    return Verified(
        files=len(packed.manifest.shards) + len(packed.splits) + 3,
        clips=len(clips),
        values=sum(clip.num_frames for clip in clips) * packed.manifest.feature_dim,
        worst=max(report.worst for report in results.values()),
    )


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Some clips to verify, with their source files."""

    number: int
    split: str
    folder: Path
    feature_dim: int
    shards: tuple[str, ...]
    clips: tuple[PackedClip, ...]
    paths: tuple[Path, ...]


@dataclass(kw_only=True)
class _Report:
    """What is wrong with a task's clips."""

    problems: list[str] = field(default_factory=list)
    worst: float = 0.0


def _list_tasks(packed: Listing, sources: dict[str, list[SourceClip]]) -> Iterator[_Task]:
    number = 0
    for split, clips in packed.splits.items():
        paths = {clip.id: clip.path for clip in sources[split]}
        for start in range(0, len(clips), _CLIPS_PER_TASK):
            part = clips[start : start + _CLIPS_PER_TASK]
            yield _Task(
                number=number,
                split=split,
                folder=packed.folder,
                feature_dim=packed.manifest.feature_dim,
                shards=tuple(packed.manifest.shards[clip.shard].name for clip in part),
                clips=tuple(part),
                paths=tuple(paths[clip.id] for clip in part),
            )
            number += 1


def _verify_task(encoding: Encoding, task: _Task) -> _Report:
    report = _Report()
    store = LocalStore(task.folder)
    for clip, shard, path in zip(task.clips, task.shards, task.paths, strict=True):
        what = f"{task.folder / shard}: clip {clip.id} of split {task.split}"
        stored = np.empty((clip.num_frames, task.feature_dim), encoding.dtype)
        try:
            store.read_into(shard, clip.offset, stored.data.cast("B"))
        except InputError as error:
            report.problems += [f"{what}: {problem}" for problem in error.problems]
            continue
        if xxhash.xxh3_64_intdigest(stored.data) != clip.checksum:
            report.problems.append(f"{what}: its bytes do not have the checksum they were packed with; {REPAIR}")
            continue
        try:
            if checksum_file(path)[1] != clip.source_checksum:
                report.problems.append(f"{path}: changed since it was packed; pack the corpus anew")
                continue
            features = read_features(path, check_finite=False)
        except (OSError, InputError) as error:
            report.problems.append(f"{path}: packed, but cannot be read any more ({error}); mend the source")
            continue
        if features.shape != stored.shape:
            report.problems.append(
                f"{what}: expected {list(features.shape)} as in {path}, found {list(stored.shape)}; {REPAIR}"
            )
        elif encoding.dtype == "float32":
            if not np.array_equal(features.view(np.uint32), stored.view(np.uint32)):
                report.problems.append(f"{what}: its values are not those of {path}; {REPAIR}")
        else:
            excess = largest_excess(features, decode(stored, encoding), encoding)
            report.worst = max(report.worst, excess)
            if not excess <= 1:
                report.problems.append(f"{what}: off by {excess:g} times the bound from {path}; {REPAIR}")
    return report


def _check_shards(packed: Listing) -> list[str]:
    """Compare sizes and headers of the shards with what the index says."""
    problems = []
    members: dict[int, list[PackedClip]] = {}
    for clips in packed.splits.values():
        for clip in clips:
            members.setdefault(clip.shard, []).append(clip)
    manifest = packed.manifest
    for number, entry in enumerate(manifest.shards):
        path = packed.folder / entry.name
        clips = members.get(number, [])
        frames = np.array([clip.num_frames for clip in clips], np.int64)
        header = shard_header([clip.id for clip in clips], frames, manifest.feature_dim, manifest.dtype)
        sizes = record_bytes(frames, manifest.feature_dim, manifest.dtype)
        offsets = len(header) + np.cumsum(sizes) - sizes
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                found = file.read(len(header))
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror}); {REPAIR}")
            continue
        if size != entry.bytes or size != len(header) + int(sizes.sum()):
            problems.append(f"{path}: expected {entry.bytes} bytes, found {size}; {REPAIR}")
        elif found != header or offsets.tolist() != [clip.offset for clip in clips]:
            problems.append(f"{path}: its header is not what the index says; {REPAIR}")
    return problems
