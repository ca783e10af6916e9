"""Clips as columns: what the plan, the loader and the scoring ask of a split, however its features are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.data.corpus import Clip, clip_digest, min_output_frames
from trainer.data.features import ClipScan, read_features, scan_clip
from trainer.errors import InputError, name_some
from trainer.randomness import UInt64s, clip_keys

Ints = npt.NDArray[np.integer[Any]]
Stored = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How stored values become features: `stored * scale + center`, or as they are where these are None."""

    dtype: np.dtype[Any]
    center: npt.NDArray[np.float32] | None = None
    scale: npt.NDArray[np.float32] | None = None
    frame_size: int = 0
    """Pixels a side to which the frames of a video are brought; 0 for features."""
    crop_size: int = 0
    """Pixels a side of the part of them that the model sees."""

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Return the shape of a frame of a video as the model sees it, `(H, W, 3)`; empty for features."""
        return (self.crop_size, self.crop_size, 3) if self.frame_size else ()

    def decode(self, stored: Stored) -> npt.NDArray[np.float32]:
        """Return the features `[T, D]` of stored values; a copy where they are not stored as float32."""
        features = stored.astype(np.float32, copy=False)
        if self.scale is not None and self.center is not None:
            features = features * self.scale + self.center
        return features


class ClipTable(Protocol):
    """All clips of a split. Columns are `[N]` and may be mapped from a file; no object is made per clip."""

    split: str
    where: str
    """The corpus, for messages."""
    feature_dim: int
    storage: Storage
    is_local: bool
    """Whether reading waits for nothing but this machine."""
    num_frames: Ints
    num_glosses: Ints
    min_outputs: Ints
    keys: UInt64s
    digests: UInt64s

    def id(self, row: int) -> str:
        """Return a clip's id."""

    def signer(self, row: int) -> str:
        """Return who signs a clip; empty if unknown."""

    def glosses(self, row: int) -> tuple[str, ...]:
        """Return what is signed in a clip."""

    def all_glosses(self) -> set[str]:
        """Return the glosses that occur in the split."""

    def frame_rate(self, row: int) -> float | None:
        """Return a clip's frames per second; None where its files do not say."""

    def read(self, row: int, buffer: Stored, *, verify: bool) -> Stored:
        """Return the stored values `[T, D]` of a clip: in `buffer`, of that shape, or where they were unpacked to.

        `verify` asks for checks that a reader need not repeat. Raises `InputError` that names clip and file.
        """

    def warm(self, row: int) -> None:
        """Bring a clip's record near, ahead of its reading."""

    def scan(self, row: int) -> ClipScan:
        """Read and check a clip in full; a problem is returned."""

    def stamp(self, rows: Sequence[int] | Ints) -> str:
        """Tell the state of the clips' files apart from any other, without reading them."""

    def find_problems(self, share: int, shares: int) -> list[str]:
        """List what is wrong with the files, one of `shares` equal parts of them, without reading them in full."""

    def read_order(self, rows: Ints) -> Ints:
        """Return the order in which the rows are best read, as places in `rows`."""


class Split:
    """Some clips of a table, in their order; the columns are the table's where it is all of them."""

    def __init__(
        self, table: ClipTable, rows: npt.NDArray[np.int64] | None = None, *, max_frames: int | None = None
    ) -> None:
        """Take the rows of a table (None: all), each clip cut to its first `max_frames`."""
        self.table = table
        self.rows = rows
        self.max_frames = max_frames
        self.name, self.feature_dim, self.storage = table.split, table.feature_dim, table.storage
        self.is_video = table.storage.frame_size > 0
        chosen = slice(None) if rows is None else rows
        self.num_frames: Ints = table.num_frames[chosen]
        if max_frames is not None:
            self.num_frames = np.minimum(self.num_frames, max_frames)
        self.num_glosses: Ints = table.num_glosses[chosen]
        self.min_outputs: Ints = table.min_outputs[chosen]
        self.keys: UInt64s = table.keys[chosen]

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.num_frames)

    @property
    def input_name(self) -> str:
        """Say what a frame is."""
        height = self.storage.crop_size
        return f"{height}x{height} pixels a frame" if self.is_video else f"D = {self.feature_dim}"

    def row(self, index: int) -> int:
        """Return a clip's row in the table."""
        return index if self.rows is None else int(self.rows[index])

    def id(self, index: int) -> str:
        """Return a clip's id."""
        return self.table.id(self.row(index))

    def signer(self, index: int) -> str:
        """Return who signs a clip; empty if unknown."""
        return self.table.signer(self.row(index))

    def glosses(self, index: int) -> tuple[str, ...]:
        """Return what is signed in a clip."""
        return self.table.glosses(self.row(index))

    def frame_rate(self, index: int) -> float | None:
        """Return a clip's frames per second; None where its files do not say."""
        return self.table.frame_rate(self.row(index))

    def choose(self, indices: npt.NDArray[np.int64]) -> Split:
        """Return some of the clips, in this order."""
        rows = indices if self.rows is None else self.rows[indices]
        return Split(self.table, rows, max_frames=self.max_frames)

    def cut(self, max_frames: int) -> Split:
        """Return the same clips with their first `max_frames` frames alone."""
        return Split(self.table, self.rows, max_frames=max_frames)

    def feasible(self, total_stride: int) -> npt.NDArray[np.bool_]:
        """Tell of each clip whether CTC can emit its glosses in its output frames, `[N]`."""
        return np.asarray(-(-self.num_frames // total_stride) >= self.min_outputs)

    def hash_clips(self) -> str:
        """Hash which clips there are, in their order, with their frames and glosses."""
        digests = self.table.digests if self.rows is None else self.table.digests[self.rows]
        found = hashlib.sha256(np.ascontiguousarray(digests, dtype="<u8").data)
        if self.max_frames is not None:
            found.update(f"cut to {self.max_frames}".encode())
        return found.hexdigest()

    def stamp(self) -> str:
        """Tell the state of the clips' files apart from any other, without reading them."""
        return self.table.stamp(range(len(self)) if self.rows is None else self.rows)

    def read(self, index: int, buffer: Stored, *, verify: bool = False) -> Stored:
        """Return the stored values `[T, D]` of a clip, in `buffer` or where they were unpacked to."""
        row, num_frames = self.row(index), len(buffer)
        try:
            if num_frames == self.table.num_frames[row]:
                return self.table.read(row, buffer, verify=verify)
            # A record's checksum is that of all its frames.
            whole = np.empty((int(self.table.num_frames[row]), *buffer.shape[1:]), buffer.dtype)
            cut: Stored = self.table.read(row, whole, verify=verify)[:num_frames]
            return cut
        except InputError as error:
            name = self.id(index)
            named = InputError([part if name in part else f"clip {name}: {part}" for part in error.problems])
            # The rank that has the clip is the only one to know.
            named.local = True
            raise named from None


class ListedTable:
    """Clips that are listed one by one; what holds however they are stored."""

    is_local = True

    def __init__(self, split: str, clips: Sequence[Clip], feature_dim: int, where: str, storage: Storage) -> None:
        self.split, self.where, self.feature_dim, self.storage = split, where, feature_dim, storage
        self.clips = clips
        self.num_frames: Ints = np.array([clip.num_frames for clip in clips], dtype=np.int64)
        self.num_glosses: Ints = np.array([len(clip.glosses) for clip in clips], dtype=np.int64)
        self.min_outputs: Ints = np.array([min_output_frames(clip.glosses) for clip in clips], dtype=np.int64)
        self.keys = clip_keys([clip.id for clip in clips])
        digests = [clip_digest(clip.id, clip.num_frames, clip.glosses) for clip in clips]
        self.digests = np.array(digests, dtype=np.uint64)

    def id(self, row: int) -> str:
        """Return a clip's id."""
        return self.clips[row].id

    def signer(self, row: int) -> str:
        """Return who signs a clip; empty if unknown."""
        return self.clips[row].signer

    def glosses(self, row: int) -> tuple[str, ...]:
        """Return what is signed in a clip."""
        return self.clips[row].glosses

    def all_glosses(self) -> set[str]:
        """Return the glosses that occur in the split."""
        return {gloss for clip in self.clips for gloss in clip.glosses}

    def frame_rate(self, row: int) -> float | None:
        """Return nothing: neither features nor folders of frames say it."""
        return None

    def warm(self, row: int) -> None:
        """Do nothing: the files are small and the kernel reads ahead."""

    def find_problems(self, share: int, shares: int) -> list[str]:
        """Find none: what is wrong with a clip's files shows when they are read."""
        return []

    def read_order(self, rows: Ints) -> Ints:
        """Return the order as it is: each clip has files of its own."""
        return np.arange(len(rows))


class FolderTable(ListedTable):
    """Clips with a feature file each."""

    def __init__(self, split: str, clips: Sequence[Clip], feature_dim: int, where: str) -> None:
        super().__init__(split, clips, feature_dim, where, Storage(dtype=np.dtype(np.float32)))

    def read(self, row: int, buffer: Stored, *, verify: bool) -> Stored:
        """Return a clip's features, unpacked to an array of their own."""
        clip = self.clips[row]
        features = read_features(clip.source, check_finite=verify)
        if features.shape != buffer.shape:
            raise InputError(
                f"{clip.source}: holds {list(features.shape)} values, {list(buffer.shape)} when the run began; do not "
                "replace features during a run"
            )
        return features

    def scan(self, row: int) -> ClipScan:
        """Read and check a clip in full."""
        return scan_clip(self.clips[row].source, self.feature_dim)

    def stamp(self, rows: Sequence[int] | Ints) -> str:
        """Hash the sizes and times of change of the clips' files, but not where they lie."""
        clips = [self.clips[row] for row in rows]
        facts = [(clip.split, clip.id, (stat := clip.source.stat()).st_size, stat.st_mtime_ns) for clip in clips]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def shared_ids(one: Split, other: Split) -> str:
    """Name the clips that two splits have in common; empty if there are none."""
    common = np.intersect1d(one.keys, other.keys)
    if not len(common):
        return ""
    names = sorted(one.id(int(index)) for index in np.flatnonzero(np.isin(one.keys, common)))
    return f"{len(names)} clip ids are in {one.name} and in {other.name}: {name_some(names)}"


def folder_split(split: str, clips: Sequence[Clip], feature_dim: int, data_dir: Path) -> Split:
    """Wrap clips with a feature file each."""
    return Split(FolderTable(split, clips, feature_dim, str(data_dir)))
