"""The clips of a packed corpus and of its source, listed and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load

from trainer.data.annotations import find_annotation_file, read_annotation_file
from trainer.data.features import feature_paths
from trainer.data.shards.encode import Encoding
from trainer.data.shards.format import INDEX_COLUMNS, MANIFEST, Columns, Manifest, map_columns, nth_string
from trainer.data.shards.pack_source import Source, checksum_file
from trainer.errors import InputError, name_some

REPAIR = "copy the corpus again or pack it anew"

_READER_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class PackedClip:
    """One clip as the index knows it."""

    id: str
    signer: str
    glosses: tuple[str, ...]
    num_frames: int
    shard: int
    offset: int
    checksum: int
    source_checksum: int


@dataclass(frozen=True, kw_only=True)
class SourceClip:
    """One clip as the source has it."""

    id: str
    signer: str
    glosses: tuple[str, ...]
    path: Path


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A packed corpus, its index in memory."""

    folder: Path
    manifest: Manifest
    encoding: Encoding
    splits: dict[str, list[PackedClip]]


def is_packed(folder: Path) -> bool:
    """Tell whether a folder holds a packed corpus."""
    return (folder / MANIFEST).is_file()


def open_listing(folder: Path) -> Listing:
    """List a packed corpus, comparing the checksums of all files but shards, and the sizes of these.

    Raises one `InputError` with all that is damaged.
    """
    try:
        manifest = Manifest.parse((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    except OSError as error:
        raise InputError(
            f"{folder}: expected a packed corpus, found no {MANIFEST} that can be read ({error.strerror}); mend the "
            "path, or pack there with `signscale pack`"
        ) from None
    problems = []
    for entry in (*(split.index for split in manifest.splits.values()), manifest.vocabulary, manifest.statistics):
        path = folder / entry.name
        try:
            size, checksum = checksum_file(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror}); {REPAIR}")
            continue
        if size != entry.bytes or f"{checksum:016x}" != entry.xxh3:
            problems.append(
                f"{path}: expected {entry.bytes} bytes of checksum {entry.xxh3}, found {size} of {checksum:016x}; "
                f"damaged: {REPAIR}"
            )
    for shard in manifest.shards:
        path = folder / shard.name
        found = path.stat().st_size if path.is_file() else None
        if found != shard.bytes:
            there = "no such file" if found is None else f"{found}"
            problems.append(f"{path}: expected {shard.bytes} bytes, found {there}; the shard is not whole: {REPAIR}")
    if problems:
        raise InputError(problems)
    try:
        statistics = load((folder / manifest.statistics.name).read_bytes())
        glosses = _read_glosses(folder / manifest.vocabulary.name)
        encoding = Encoding(
            dtype=manifest.dtype, scaling=manifest.scaling, center=statistics["center"], scale=statistics["scale"]
        )
        splits = {
            name: _list_clips(map_columns(folder / entry.index.name, INDEX_COLUMNS), glosses)
            for name, entry in manifest.splits.items()
        }
    except (SafetensorError, KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder}: expected a packed corpus, found one that contradicts itself ({error}); {REPAIR}"
        ) from None
    return Listing(folder=folder, manifest=manifest, encoding=encoding, splits=splits)


def list_source(source: Path, annotations: str, splits: Sequence[str]) -> dict[str, list[SourceClip]]:
    """List the clips that a source has now, annotated and with a feature file, without reading any."""
    found: dict[str, list[SourceClip]] = {}
    problems: list[str] = []
    for split in splits:
        try:
            lines = read_annotation_file(find_annotation_file(annotations, split))
        except InputError as error:
            problems += error.problems
            continue
        places = ((line, feature_paths(source, split, line.id)) for line in lines)
        found[split] = [
            SourceClip(id=line.id, signer=line.signer, glosses=line.glosses, path=path)
            for line, paths in places
            if (path := next((path for path in paths if path.is_file()), None)) is not None
        ]
    if problems:
        raise InputError(problems)
    return found


def known_clips(source: Source) -> dict[str, list[SourceClip]]:
    """List the clips of a source that was read already."""
    return {
        split: [SourceClip(id=c.id, signer=c.signer, glosses=c.glosses, path=c.source) for c in clips]
        for split, clips in source.splits.items()
    }


def compare_source(packed: Listing, found: dict[str, list[SourceClip]], advance: Callable[[int], object]) -> list[str]:
    """Describe every clip that differs from what was packed: changed, missing, new, or in another order.

    Reads all source files, for their checksums; `advance` counts them.
    """
    differences = []
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        for split in dict.fromkeys([*packed.splits, *found]):
            before = {clip.id: clip for clip in packed.splits.get(split, [])}
            now = {clip.id: clip for clip in found.get(split, [])}
            both = [clip for clip in now.values() if clip.id in before]
            annotated_otherwise, other_features = [], []
            for clip, checksum in zip(both, pool.map(_checksum_or_none, both), strict=True):
                advance(1)
                then = before[clip.id]
                if (clip.glosses, clip.signer) != (then.glosses, then.signer):
                    annotated_otherwise.append(clip.id)
                if checksum != then.source_checksum:
                    other_features.append(clip.id)
            for what, ids in (
                ("were packed with another annotation", annotated_otherwise),
                ("were packed from another feature file", other_features),
                ("were packed and are missing now", [name for name in before if name not in now]),
                ("are new", [name for name in now if name not in before]),
            ):
                if ids:
                    differences.append(f"split {split}: {len(ids)} clips {what}: {name_some(ids, limit=100)}")
            if list(before) != list(now) and before.keys() == now.keys():
                differences.append(f"split {split}: the clips are in another order")
    return differences


def _list_clips(columns: Columns, glosses: Sequence[str]) -> list[PackedClip]:
    clips = []
    start = 0
    for place in range(len(columns["num_frames"])):
        stop = int(columns["gloss_end"][place])
        clips.append(
            PackedClip(
                id=nth_string(columns["ids"], columns["id_end"], place),
                signer=nth_string(columns["signer_names"], columns["signer_name_end"], int(columns["signer"][place])),
                glosses=tuple(glosses[gloss] for gloss in columns["glosses"][start:stop].tolist()),
                num_frames=int(columns["num_frames"][place]),
                shard=int(columns["shard"][place]),
                offset=int(columns["offset"][place]),
                checksum=int(columns["checksum"][place]),
                source_checksum=int(columns["source_checksum"][place]),
            )
        )
        start = stop
    return clips


def _read_glosses(path: Path) -> list[str]:
    return list(json.loads(path.read_bytes())["glosses"])


def _checksum_or_none(clip: SourceClip) -> int | None:
    try:
        return checksum_file(clip.path)[1]
    except OSError:
        return None
