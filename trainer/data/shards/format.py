"""The format of a packed corpus: a manifest, an index per split, and shards of records that lie end to end.

    manifest.json                what this is, the sizes and checksums of all other files
    vocabulary.json              all glosses, and how often each split signs them
    statistics.safetensors       how features were scaled, and the moments of the training split
    index-<split>.safetensors    one column per property of a clip, memory-mapped
    shards/<split>-00000.safetensors …

A shard is a plain safetensors file with a tensor `[T, D]` a clip, named by the clip's id, in the order of the
annotations; whoever has the index reads a record without looking at the shard's header. The manifest is complete only
when all else is: a folder without one is no corpus.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError

FORMAT, VERSION = "signscale-shards", 1
MANIFEST, VOCABULARY, STATISTICS = "manifest.json", "vocabulary.json", "statistics.safetensors"

StorageType: TypeAlias = Literal["float16", "float32"]
Scaling: TypeAlias = Literal["deviation", "none"]
Columns: TypeAlias = dict[str, npt.NDArray[Any]]

INDEX_COLUMNS: dict[str, str] = {
    "shard": "int32",
    "offset": "int64",
    "num_frames": "int32",
    "min_outputs": "int32",
    "checksum": "uint64",
    "key": "uint64",
    "digest": "uint64",
    "signer": "int32",
    "id_end": "int64",
    "gloss_end": "int64",
    "source_bytes": "int64",
    "source_checksum": "uint64",
    "ids": "uint8",
    "glosses": "int32",
    "signer_name_end": "int64",
    "signer_names": "uint8",
}
"""Columns of an index and their types; the first twelve are `[N]`.

`shard` is the place in the manifest's list, `offset` counts bytes from the beginning of the shard's file; `checksum` is
xxh3-64 of the record's bytes, `source_checksum` of the source file's. `min_outputs` counts glosses plus adjacent
repeats; `key` is `trainer.randomness.clip_keys` of the id, `digest` is `trainer.data.corpus.clip_digest`. Strings lie
end to end as UTF-8 (`ids`, `signer_names`) and end before `*_end`; `glosses` are places in the vocabulary's list, and
`signer` one in `signer_names`.
"""

_SPLIT_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the corpus; `xxh3` is its xxh3-64 in hexadecimal digits (empty for shards, whose records have one)."""

    name: str
    bytes: int
    xxh3: str = ""


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """A split: its clips, their frames in all, and its index."""

    clips: int
    frames: int
    index: FileEntry


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a packed corpus is and holds."""

    dtype: StorageType
    """Type of the stored values."""
    scaling: Scaling
    """deviation: stored value = (feature - center) / scale, both per dimension; none: the feature itself."""
    feature_dim: int
    """D."""
    splits: dict[str, SplitEntry]
    shards: list[FileEntry]
    vocabulary: FileEntry
    statistics: FileEntry
    source_fingerprint: str
    """SHA-256 over split, id and checksum of every source file, in order, in hexadecimal digits."""
    source_bytes: int
    """Bytes of all source files."""
    error: dict[str, float]
    """Largest and mean absolute error of the stored values, over all frames and dimensions: max, mean, and
    max_in_deviations, the largest in units of its dimension's standard deviation."""

    def to_json(self) -> dict[str, Any]:
        """Return what `manifest.json` holds."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Manifest:
        """Read a manifest; raises `InputError` for another format or version, or a damaged one."""
        mend = "copy the corpus again or pack it anew"
        try:
            stored = json.loads(text)
            kind, version = stored.pop("format"), stored.pop("version")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{where}: expected the manifest of a packed corpus, found a damaged one; {mend}"
            ) from None
        if kind != FORMAT or version != VERSION:
            raise InputError(
                f"{where}: expected {FORMAT} version {VERSION}, found {kind} version {version}; pack the corpus anew "
                "with `signscale pack`, or use the version of signscale that packed it"
            )
        try:
            splits = {
                name: SplitEntry(**{**entry, "index": FileEntry(**entry["index"])})
                for name, entry in stored.pop("splits").items()
            }
            manifest = cls(
                splits=splits,
                shards=[FileEntry(**entry) for entry in stored.pop("shards")],
                vocabulary=FileEntry(**stored.pop("vocabulary")),
                statistics=FileEntry(**stored.pop("statistics")),
                **stored,
            )
        except (KeyError, TypeError, AttributeError):
            raise InputError(
                f"{where}: expected the manifest of a packed corpus, found a damaged one; {mend}"
            ) from None
        names = [
            *(entry.index.name for entry in splits.values()),
            *(entry.name for entry in (*manifest.shards, manifest.vocabulary, manifest.statistics)),
        ]
        # A manifest may come from anywhere: it names files of its own folder alone.
        if manifest.dtype not in ("float16", "float32") or any(_leads_out(name) for name in names):
            raise InputError(f"{where}: expected the manifest of a packed corpus, found a damaged one; {mend}")
        return manifest


def index_name(split: str) -> str:
    """Return the name of a split's index; raises `InputError` for a split whose name no file can carry."""
    if not _SPLIT_NAME.fullmatch(split):
        raise InputError(f"split {split!r}: expected letters, digits, _, - and . alone; rename its folder")
    return f"index-{split}.safetensors"


def shard_name(split: str, number: int) -> str:
    """Return the name of a split's shard."""
    return f"shards/{split}-{number:05d}.safetensors"


def record_bytes(num_frames: npt.NDArray[np.int64], feature_dim: int, dtype: StorageType) -> npt.NDArray[np.int64]:
    """Return the bytes of records of `num_frames` `[N]`."""
    return np.asarray(num_frames, dtype=np.int64) * (feature_dim * np.dtype(dtype).itemsize)


def map_columns(path: Path, expected: Mapping[str, str] | None = None) -> Columns:
    """Map the tensors of a safetensors file into memory, without reading them.

    `expected` names the columns and their types. Raises `InputError` if the file is not what is expected.
    """
    mend = "copy the corpus again or pack it anew"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if not 0 < header_size <= size - 8:
                raise ValueError("no header")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        start = 8 + header_size
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=start) if size > start else np.empty(0, np.uint8)
        columns = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= len(data):
                raise ValueError("cut short")
            columns[name] = np.asarray(data[first:last]).view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {mend}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: expected an index as safetensors, found a damaged file; {mend}") from None
    for name, kind in (expected or {}).items():
        if name not in columns or columns[name].dtype != np.dtype(kind):
            raise InputError(f"{path}: expected a column {name} of {kind}, found none; {mend}")
    return columns


def join_strings(strings: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Lay strings end to end as UTF-8: the bytes, and where each ends `[N]`."""
    parts = [string.encode() for string in strings]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.frombuffer(b"".join(parts), dtype=np.uint8), ends


def nth_string(joined: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64], index: int) -> str:
    """Return one of the strings that `join_strings` laid end to end."""
    start = int(ends[index - 1]) if index else 0
    return joined[start : int(ends[index])].tobytes().decode()


def _leads_out(name: str) -> bool:
    return not name or name.startswith("/") or ".." in Path(name).parts


_TYPES = {
    "U8": "uint8",
    "I32": "<i4",
    "I64": "<i8",
    "U64": "<u8",
    "F32": "<f4",
    "F64": "<f8",
}
