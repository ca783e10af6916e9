"""Files of the packing: written durably, laid out as safetensors, described when there is no room."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors.numpy import save

from trainer.data.shards.format import Columns, FileEntry, StorageType, record_bytes
from trainer.errors import InputError
from trainer.files import sync_folder

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ALIGNMENT = 64
_SAFETENSORS_TYPES: dict[StorageType, str] = {"float16": "F16", "float32": "F32"}


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file, atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_tensors(path: Path, tensors: Columns) -> None:
    """Replace a file by tensors as safetensors, atomically and durably."""
    # Not by the library, which hides the number of an error.
    write_bytes(path, save(tensors))


def write_entry(folder: Path, name: str, content: bytes) -> FileEntry:
    """Write a file of the corpus; return what the manifest says of it."""
    write_bytes(folder / name, content)
    return FileEntry(name=name, bytes=len(content), xxh3=xxhash.xxh3_64_hexdigest(content))


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of `content` (bytes) at an offset."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


def shard_header(ids: Sequence[str], num_frames: npt.NDArray[np.int64], feature_dim: int, dtype: StorageType) -> bytes:
    """Return the first bytes of a shard, in the order of its records; the data begin at a multiple of 64 bytes.

    Not by the library, which would order records by their names.
    """
    ends = np.cumsum(record_bytes(num_frames, feature_dim, dtype)).tolist()
    entries = {
        clip_id: {"dtype": _SAFETENSORS_TYPES[dtype], "shape": [frames, feature_dim], "data_offsets": [start, end]}
        for clip_id, frames, start, end in zip(ids, num_frames.tolist(), [0, *ends[:-1]], ends, strict=True)
    }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def describe_failure(folder: Path, error: OSError) -> InputError:
    """Say why a file of the packing cannot be written, and how to go on."""
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return InputError(
            f"{folder}: no room to write ({reason}); make room there (or raise the quota or the limit of file sizes), "
            "then give the same command again: it goes on where this one ended"
        )
    return InputError(
        f"{error.filename or folder}: cannot be written ({reason}); mend the folder or its rights, then give the same "
        "command again: it goes on where this one ended"
    )
