"""What is packed: the splits of a feature corpus, their clips, and whether they are still the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from trainer.data.annotations import FILE_NAMES
from trainer.data.corpus import Clip, feature_dim, read_split
from trainer.data.shards.format import index_name
from trainer.data.video.sources import is_video_corpus
from trainer.errors import InputError, name_some

Log = Callable[[str], None]

_BLOCK = 1 << 22
_READER_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """The clips to pack, in the order of their annotations."""

    splits: dict[str, list[Clip]]
    feature_dim: int

    @property
    def clips(self) -> list[Clip]:
        """Return the clips of all splits, one split after the other."""
        return [clip for clips in self.splits.values() for clip in clips]


def default_annotations(source: Path) -> str:
    """Return where a corpus keeps its annotations: SOURCE/annotations, else SOURCE."""
    beside = source / "annotations"
    return str(beside if beside.is_dir() else source)


def choose_splits(source: Path, annotations: str, asked: Sequence[str], log: Log) -> list[str]:
    """Return the splits to pack: those asked for, else every sub-folder with annotations, train first.

    Folders of feature files that have no annotations are named through `log`. Raises `InputError` if train is not
    among them, or a name cannot be one of a file.
    """
    if not source.is_dir():
        raise InputError(f"{source}: expected the corpus folder with train/ and dev/, found none; mend SOURCE")
    if is_video_corpus(source, annotations, "train"):
        raise InputError(f"{source}: holds video, and only features can be packed; train from the frames as they are")
    if asked:
        if twice := sorted({split for split in asked if asked.count(split) > 1}):
            raise InputError(f"--splits: expected each split once, found {', '.join(twice)} twice; remove one")
        splits = list(asked)
    else:
        folders = sorted(path.name for path in source.iterdir() if path.is_dir())
        splits = sorted((name for name in folders if _has_annotations(annotations, name)), key=lambda s: s != "train")
        for name in folders:
            if name not in splits and next((source / name).rglob("*.npz"), None) is not None:
                log(f"{source / name}: left out, since no file in {annotations} annotates it")
    if "train" not in splits:
        found = f"found {', '.join(splits)}" if splits else "found none"
        raise InputError(
            f"{source}: expected splits with train among them, {found}; the scaling and the vocabulary come from it: "
            f"add its folder and its annotations ({annotations})"
        )
    for split in splits:
        index_name(split)
    return splits


def read_source(source: Path, annotations: str, splits: Sequence[str], *, allow_missing: bool, log: Log) -> Source:
    """Join annotations and feature files of all splits; raises one `InputError` with every problem found."""
    read: dict[str, list[Clip]] = {}
    problems: list[str] = []
    dim: int | None = None
    # The training split first: the others are held to its D.
    for split in sorted(splits, key=lambda split: split != "train"):
        try:
            read[split] = read_split(source, annotations, split, allow_missing=allow_missing, log=log, expected_dim=dim)
        except InputError as error:
            problems += error.problems
            continue
        if dim is None:
            dim = feature_dim(read[split])
        problems += [
            f"{source}: a clip is named __metadata__, which safetensors files reserve; rename it"
            for clip in read[split]
            if clip.id == "__metadata__"
        ]
    if problems:
        raise InputError(problems)
    assert dim is not None
    found = {split: read[split] for split in splits}
    train_ids = {clip.id for clip in found["train"]}
    for split, clips in found.items():
        if split != "train" and (shared := sorted(train_ids & {clip.id for clip in clips})):
            log(f"warning: {len(shared)} clip ids are in train and in {split}: {name_some(shared)}; check for a leak")
    return Source(splits=found, feature_dim=dim)


def hash_state(source: Source) -> str:
    """Hash all that packing depends on and that can be had without reading the files: sizes and times included."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        for split, clips in source.splits.items():
            for clip, status in zip(clips, pool.map(_stat, clips), strict=True):
                row = (split, clip.id, clip.signer, clip.glosses, clip.num_frames, status.st_size, status.st_mtime_ns)
                digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def checksum_file(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its xxh3-64; raises `OSError`."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_BLOCK, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.intdigest()


def fingerprint(rows: Sequence[tuple[str, str, int]]) -> str:
    """Return the SHA-256 over (split, id, checksum) of every source file, in hexadecimal digits."""
    digest = hashlib.sha256()
    for split, clip_id, checksum in rows:
        digest.update(f"{split}\0{clip_id}\0{checksum:016x}\n".encode())
    return digest.hexdigest()


def _stat(clip: Clip) -> os.stat_result:
    try:
        return clip.source.stat()
    except OSError as error:
        raise InputError(
            f"{clip.source}: cannot be read any more ({error.strerror}); let the extraction end first, then pack again"
        ) from None


def _has_annotations(annotations: str, split: str) -> bool:
    path = Path(annotations.replace("{split}", split))
    if not path.is_dir():
        return "{split}" in annotations and path.is_file()
    names = {name.replace("{split}", split).lower() for name in FILE_NAMES}
    return any(file.name.lower() in names and file.is_file() for file in path.iterdir())
