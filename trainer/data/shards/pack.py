"""Packing: a feature corpus into shards, in two passes that go on where they were ended, published by one rename.

OUT.packing/lock         held by the process that packs
OUT.packing/state.json   what is packed and how: a later attempt must want the same
OUT.packing/scan/        what the first pass found, a file per 64 clips
OUT.packing/written/     checksums and errors of each finished shard
OUT.packing/corpus/      the corpus, renamed to OUT when all of it is on the disk
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer.data.normalization import from_moments
from trainer.data.shards.encode import Encoding, choose_encoding
from trainer.data.shards.format import (
    MANIFEST,
    STATISTICS,
    VOCABULARY,
    FileEntry,
    Manifest,
    Scaling,
    SplitEntry,
    StorageType,
    index_name,
)
from trainer.data.shards.pack_files import describe_failure, write_bytes, write_entry
from trainer.data.shards.pack_index import index_file, list_glosses, statistics_file, vocabulary_file
from trainer.data.shards.pack_listing import Listing, compare_source, is_packed, known_clips, open_listing
from trainer.data.shards.pack_scan import Findings, scan
from trainer.data.shards.pack_source import (
    Log,
    Source,
    choose_splits,
    default_annotations,
    fingerprint,
    hash_state,
    read_source,
)
from trainer.data.shards.pack_state import begin, locked, remove
from trainer.data.shards.pack_workers import WorkerPool
from trainer.data.shards.pack_write import Shard, Written, drop_unfinished, is_written, plan_shards, write_shards
from trainer.errors import InputError
from trainer.files import sync_folder

_BYTES_PER_CLIP = 1000
"""Generous room for a clip in an index."""


class Progress(Protocol):
    """Counts clips for whoever waits."""

    def __call__(self, what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
        """Begin to count `total` clips; what it yields takes how many more are done."""


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """What to pack, where to, and how."""

    source: Path
    out: Path
    annotations: str = ""
    """A folder or a pattern; empty: beside the features, as in training."""
    splits: tuple[str, ...] = ()
    """Empty: every folder that has annotations."""
    dtype: StorageType = "float16"
    scaling: Scaling = "deviation"
    shard_bytes: int = 512_000_000
    allow_missing: bool = False

    @property
    def where(self) -> str:
        """Return where the annotations are."""
        return self.annotations or default_annotations(self.source)

    @property
    def stored_scaling(self) -> Scaling:
        """Return the scaling that is used: float32 needs none."""
        return self.scaling if self.dtype == "float16" else "none"

    @property
    def target(self) -> Path:
        """Return where the corpus will be."""
        return self.out.resolve()

    @property
    def folder(self) -> Path:
        """Return where the packing goes on until it is done."""
        return self.target.with_name(f"{self.target.name}.packing")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` has done."""

    corpus: Listing
    source: Source
    fresh: bool
    """Whether it was packed now; else it was there."""
    seconds: dict[str, float]
    """Wall time per phase."""


def pack(spec: PackSpec, pool: WorkerPool, *, restart: bool, log: Log, progress: Progress) -> Packed:
    """Pack a corpus, or go on with it; nothing is done if it is packed already.

    Raises `InputError` for anything wrong with the source, for an `out` that holds something else, for a packing that
    was begun with another source or other flags, and for want of room; what was done is kept for the next attempt.
    """
    out = spec.target
    splits = choose_splits(spec.source, spec.where, spec.splits, log)
    source = read_source(spec.source, spec.where, splits, allow_missing=spec.allow_missing, log=log)
    if is_packed(out) or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        corpus = _expect_same(spec, source, progress)
        if (spec.folder / "lock").is_file():
            # Published, but ended before this was removed.
            with locked(spec.folder, log):
                remove(spec.folder)
        return Packed(corpus=corpus, source=source, fresh=False, seconds={})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        spec.folder.mkdir(exist_ok=True)
        with locked(spec.folder, log):
            seconds = _pack_locked(spec, source, pool, restart=restart, log=log, progress=progress)
    except OSError as error:
        raise describe_failure(spec.folder, error) from None
    return Packed(corpus=open_listing(out), source=source, fresh=True, seconds=seconds)


def _pack_locked(
    spec: PackSpec, source: Source, pool: WorkerPool, *, restart: bool, log: Log, progress: Progress
) -> dict[str, float]:
    wanted = {
        "dtype": spec.dtype,
        "scaling": spec.stored_scaling,
        "shard_mb": spec.shard_bytes / 1e6,
        "splits": list(source.splits),
        "source": hash_state(source),
    }
    begin(spec.folder, wanted, restart=restart, log=log)
    corpus = spec.folder / "corpus"
    corpus.mkdir(exist_ok=True)
    total, times = len(source.clips), [time.monotonic()]
    half = spec.dtype == "float16" and spec.stored_scaling == "none"
    with progress("reading", total) as advance:
        try:
            findings = scan(source, spec.folder / "scan", pool, half=half, advance=advance)
            mean = findings.moments.mean.astype(np.float32)
            encoding = choose_encoding(spec.dtype, spec.stored_scaling, mean, findings.minimum, findings.maximum)
        except InputError:
            # What mends a file changes the source: nothing of this can be used again.
            remove(spec.folder)
            raise
    times.append(time.monotonic())
    shards = _plan(spec, source)
    _check_room(spec, shards, total)
    inverse_spread = from_moments("corpus", [findings.moments], source.feature_dim).scale
    with progress("packing", total) as advance:
        written = write_shards(
            source,
            findings,
            shards,
            encoding,
            inverse_spread,
            state=spec.folder / "written",
            folder=corpus,
            pool=pool,
            advance=advance,
        )
    times.append(time.monotonic())
    _describe(spec, source, findings, shards, encoding, written, corpus)
    corpus.replace(spec.target)
    sync_folder(spec.target.parent)
    remove(spec.folder)
    times.append(time.monotonic())
    return dict(zip(("reading", "packing", "publishing"), np.diff(times).tolist(), strict=True))


def _plan(spec: PackSpec, source: Source) -> list[Shard]:
    return [
        shard
        for split, clips in source.splits.items()
        for shard in plan_shards(
            split,
            [clip.id for clip in clips],
            [clip.num_frames for clip in clips],
            source.feature_dim,
            spec.dtype,
            spec.shard_bytes,
        )
    ]


def _describe(
    spec: PackSpec,
    source: Source,
    findings: Findings,
    shards: Sequence[Shard],
    encoding: Encoding,
    written: Written,
    corpus: Path,
) -> None:
    """Write everything beside the shards, the manifest last."""
    glosses = list_glosses(source)
    entries = {}
    for split, clips in source.splits.items():
        content = index_file(
            clips,
            {place: shard for place, shard in enumerate(shards) if shard.split == split},
            glosses,
            checksums=written.checksums[split],
            source_bytes=findings.bytes[split],
            source_checksums=findings.checksums[split],
        )
        entries[split] = SplitEntry(
            clips=len(clips),
            frames=sum(clip.num_frames for clip in clips),
            index=write_entry(corpus, index_name(split), content),
        )
    checksums = [value for split in source.splits for value in findings.checksums[split].tolist()]
    manifest = Manifest(
        dtype=spec.dtype,
        scaling=spec.stored_scaling,
        feature_dim=source.feature_dim,
        splits=entries,
        shards=[FileEntry(name=shard.name, bytes=shard.bytes) for shard in shards],
        vocabulary=write_entry(corpus, VOCABULARY, vocabulary_file(source, glosses)),
        statistics=write_entry(corpus, STATISTICS, statistics_file(encoding, findings)),
        source_fingerprint=fingerprint(
            [(clip.split, clip.id, value) for clip, value in zip(source.clips, checksums, strict=True)]
        ),
        source_bytes=int(sum(sizes.sum() for sizes in findings.bytes.values())),
        error={"max": written.largest, "mean": written.mean, "max_in_deviations": written.in_deviations},
    )
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_bytes(corpus / MANIFEST, text.encode())


def _expect_same(spec: PackSpec, source: Source, progress: Progress) -> Listing:
    """Return the corpus at `out` if it is what would be packed; raises `InputError` if it is anything else."""
    mend = "give another OUT, or move or remove this one to pack there anew"
    if not is_packed(spec.out):
        raise InputError(f"{spec.out}: expected a new folder to pack to, found something else there; {mend}")
    corpus = open_listing(spec.out)
    manifest = corpus.manifest
    differences = [
        f"--{name}: {then} there, {now} asked for"
        for name, then, now in (
            ("dtype", manifest.dtype, spec.dtype),
            ("scaling", manifest.scaling, spec.stored_scaling),
            ("splits", ",".join(manifest.splits), ",".join(source.splits)),
        )
        # The scaling follows from float32: naming both would send the user after one mistake twice.
        if then != now and not (name == "scaling" and manifest.dtype != spec.dtype)
    ]
    planned = [(shard.name, shard.bytes) for shard in _plan(spec, source)]
    if not differences:
        with progress("comparing", len(source.clips)) as advance:
            differences = compare_source(corpus, known_clips(source), advance)
    if not differences and planned != [(shard.name, shard.bytes) for shard in manifest.shards]:
        differences = [f"--shard_mb: {spec.shard_bytes / 1e6:g} asked for gives other shards"]
    if differences:
        raise InputError([f"{spec.out}: holds a packed corpus of another source or other flags; {mend}", *differences])
    return corpus


def _check_room(spec: PackSpec, shards: Sequence[Shard], clips: int) -> None:
    corpus, written = spec.folder / "corpus", spec.folder / "written"
    drop_unfinished(corpus)
    needed = sum(shard.bytes for shard in shards if not is_written(shard, written, corpus)) + clips * _BYTES_PER_CLIP
    free = shutil.disk_usage(spec.folder).free
    if needed > free:
        raise InputError(
            f"{spec.folder}: packing needs {needed / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are free; make room, then "
            "give the same command again: it goes on where this one ended"
        )
