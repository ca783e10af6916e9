"""A packed corpus, opened for reading: columns mapped from its index, records read from its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import xxhash

from trainer.data.features import ClipScan, Moments, moments_of
from trainer.data.shards.format import (
    INDEX_COLUMNS,
    MANIFEST,
    Columns,
    FileEntry,
    Manifest,
    map_columns,
    nth_string,
)
from trainer.data.shards.store import ShardStore
from trainer.data.table import Ints, Split, Storage, Stored
from trainer.errors import InputError, name_some

_MEND = "copy it again or pack the corpus anew"
_STATISTICS = {"center": "float32", "scale": "float32", "train_count": "int64"} | {
    "train_mean": "float64",
    "train_m2": "float64",
}


class PackedCorpus:
    """The splits of one packed corpus, with what was computed when it was packed."""

    def __init__(self, store: ShardStore) -> None:
        """Read the manifest and the small files; raises `InputError` for one that is missing or damaged."""
        self.store = store
        text = store.local_path(MANIFEST).read_bytes()
        self.manifest = Manifest.parse(text, f"{store.location}/{MANIFEST}")
        self.fingerprint = hashlib.sha256(text).hexdigest()
        stored = self._map(self.manifest.statistics, _STATISTICS)
        self.storage = Storage(dtype=np.dtype(self.manifest.dtype))
        if self.manifest.scaling == "deviation":
            self.storage = Storage(
                dtype=np.dtype(self.manifest.dtype), center=np.array(stored["center"]), scale=np.array(stored["scale"])
            )
        self.moments = Moments(
            count=int(stored["train_count"][0]),
            mean=np.array(stored["train_mean"]),
            m2=np.array(stored["train_m2"]),
        )
        path = store.local_path(self.manifest.vocabulary.name)
        self._check(self.manifest.vocabulary, path.read_bytes())
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        self.glosses: list[str] = vocabulary["glosses"]
        self.gloss_counts: dict[str, list[int]] = vocabulary["counts"]

    def split(self, name: str) -> Split:
        """Open a split; raises `InputError` if there is none of this name, or its index is damaged."""
        if name not in self.manifest.splits:
            raise InputError(
                f"{self.store.location}: expected a split {name}, found {name_some(sorted(self.manifest.splits))}; "
                "name one of these, or pack the corpus anew with it (signscale pack --splits)"
            )
        return Split(PackedTable(self, name))

    def map_index(self, name: str) -> Columns:
        """Map the index of a split after comparing it with the manifest."""
        return self._map(self.manifest.splits[name].index, INDEX_COLUMNS)

    def _map(self, entry: FileEntry, expected: dict[str, str]) -> Columns:
        path = self.store.local_path(entry.name)
        if path.stat().st_size:
            self._check(entry, np.memmap(path, dtype=np.uint8, mode="r").data)
        return map_columns(path, expected)

    def _check(self, entry: FileEntry, content: bytes | memoryview) -> None:
        if len(content) != entry.bytes or xxhash.xxh3_64_hexdigest(content) != entry.xxh3:
            raise InputError(
                f"{self.store.location}/{entry.name}: differs from what {MANIFEST} says of it (another version of the "
                f"corpus, or damage); {_MEND}"
            )


class PackedTable:
    """All clips of a packed split."""

    def __init__(self, corpus: PackedCorpus, split: str) -> None:
        self.split, self.where = split, corpus.store.location
        self.feature_dim, self.storage = corpus.manifest.feature_dim, corpus.storage
        self.is_local = corpus.store.is_local
        self._corpus, self._store = corpus, corpus.store
        columns = corpus.map_index(split)
        self._columns = columns
        self.num_frames: Ints = columns["num_frames"]
        self.min_outputs: Ints = columns["min_outputs"]
        self.keys, self.digests = columns["key"], columns["digest"]
        entry = corpus.manifest.splits[split]
        if len(self.num_frames) != entry.clips:
            raise InputError(
                f"{self.where}/{entry.index.name}: expected {entry.clips} clips, found {len(self.num_frames)}; {_MEND}"
            )
        self.num_glosses: Ints = np.diff(columns["gloss_end"], prepend=0).astype(np.int32)
        self._shards = corpus.manifest.shards

    def id(self, row: int) -> str:
        """Return a clip's id."""
        return nth_string(self._columns["ids"], self._columns["id_end"], row)

    def signer(self, row: int) -> str:
        """Return who signs a clip; empty if unknown."""
        return nth_string(
            self._columns["signer_names"], self._columns["signer_name_end"], int(self._columns["signer"][row])
        )

    def glosses(self, row: int) -> tuple[str, ...]:
        """Return what is signed in a clip."""
        end = int(self._columns["gloss_end"][row])
        return tuple(
            self._corpus.glosses[place]
            for place in self._columns["glosses"][end - int(self.num_glosses[row]) : end].tolist()
        )

    def all_glosses(self) -> set[str]:
        """Return the glosses that occur in the split."""
        counts = self._corpus.gloss_counts[self.split]
        return {gloss for gloss, count in zip(self._corpus.glosses, counts, strict=True) if count}

    def frame_rate(self, row: int) -> float | None:
        """Return nothing: features do not say it."""
        return None

    def read(self, row: int, buffer: Stored, *, verify: bool = True) -> Stored:
        """Return a record, in memory that is not to be written to or in `buffer`.

        It is compared with its checksum, always: that costs a tenth of the reading.
        """
        name, offset = self._place(row)
        view = self._store.view(name, offset, buffer.nbytes)
        if view is not None and self._is_sound(row, view):
            return np.frombuffer(view, buffer.dtype).reshape(buffer.shape)
        space = buffer.reshape(-1).view(np.uint8).data
        self._store.read_into(name, offset, space)
        if not self._is_sound(row, space):
            # It may be a cache's copy that is damaged, and not the shard.
            self._store.discard(name, offset, len(space))
            self._store.read_into(name, offset, space)
            if not self._is_sound(row, space):
                raise InputError(
                    f"{self.where}/{name}: the record of clip {self.id(row)} (bytes {offset} to {offset + len(space)}) "
                    f"is damaged, its checksum differs; {_MEND}"
                )
        return buffer

    def _is_sound(self, row: int, record: memoryview) -> bool:
        return bool(xxhash.xxh3_64_intdigest(record) == int(self._columns["checksum"][row]))

    def warm(self, row: int) -> None:
        """Bring a record near: into the node's cache, or into memory."""
        name, offset = self._place(row)
        self._store.warm(name, offset, int(self.num_frames[row]) * self.feature_dim * self.storage.dtype.itemsize)

    def scan(self, row: int) -> ClipScan:
        """Read and check a record, and gather its moments."""
        buffer = np.empty((int(self.num_frames[row]), self.feature_dim), self.storage.dtype)
        try:
            features = self.storage.decode(self.read(row, buffer))
        except InputError as error:
            return ClipScan(problem=str(error))
        return ClipScan(num_frames=len(features), dim=self.feature_dim, moments=moments_of(features))

    def stamp(self, rows: Sequence[int] | Ints) -> str:
        """Return the corpus's fingerprint: its records have checksums, whatever the times of change say."""
        return self._corpus.fingerprint

    def find_problems(self, share: int, shares: int) -> list[str]:
        """Compare the sizes of a share of the split's shards with the manifest."""
        mine = np.unique(self._columns["shard"])[share::shares]
        problems: list[str] = []
        for entry in (self._shards[int(number)] for number in mine):
            try:
                size = self._store.size(entry.name)
            except InputError as error:
                problems += error.problems
                continue
            if size != entry.bytes:
                problems.append(
                    f"{self.where}/{entry.name}: expected {entry.bytes} bytes, found {size}; the shard is not whole: "
                    f"{_MEND}"
                )
        return problems

    def read_order(self, rows: Ints) -> Ints:
        """Return the order of the rows on the disk."""
        return np.lexsort((self._columns["offset"][rows], self._columns["shard"][rows]))

    def _place(self, row: int) -> tuple[str, int]:
        return self._shards[int(self._columns["shard"][row])].name, int(self._columns["offset"][row])
