"""A node-local cache in front of a store: the byte ranges asked for, as files, bounded in total."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.shards.bounded import BoundedFolder, touch
from trainer.data.shards.format import MANIFEST
from trainer.data.shards.store import ShardStore, blocks, reset_after_fork
from trainer.errors import InputError

_WHOLE = "whole"


@dataclass
class _Flight:
    """One extent being fetched, and who waits for it."""

    done: threading.Event = field(default_factory=threading.Event)
    waiting: int = 0
    data: bytes | None = None
    error: InputError | None = None


class CachedStore:
    """Another store, with what was read of it kept in a folder of this node that processes share.

    The folder's total stays within `limit_bytes`. Extents belong to the manifest they were read under, so that a corpus
    packed anew is not mixed with what it was; what is left of the old one ages out.
    """

    is_local = False

    def __init__(self, inner: ShardStore, folder: Path, limit_bytes: int) -> None:
        """Make the folder; raises `InputError` if it cannot be written."""
        self.location = inner.location
        self._inner = inner
        self._folder = BoundedFolder(folder, limit_bytes)
        self._base: Path | None = None
        self.after_fork()
        reset_after_fork(self)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on, from the cache if it is there."""
        if not len(buffer):
            return
        path = self._extent(name, offset, len(buffer))
        if _load(path, buffer):
            return
        with self._lock:
            flight = self._flights.get(path)
            if flight is not None:
                flight.waiting += 1
            else:
                mine = self._flights[path] = _Flight()
        if flight is None:
            self._fetch(mine, path, name, offset, buffer)
            return
        flight.done.wait()
        if flight.error is not None:
            raise InputError(flight.error.problems)
        if flight.data is None:
            # Who fetched it was interrupted, or found no room to keep it.
            self._inner.read_into(name, offset, buffer)
        else:
            buffer[:] = flight.data

    def view(self, name: str, offset: int, length: int) -> memoryview | None:
        """Return None: where an extent lies is a matter of an eviction."""
        return None

    def warm(self, name: str, offset: int, length: int) -> None:
        """Fetch these bytes into the cache, unless they are there, on their way, or have no room."""
        if length <= 0 or not self._folder.takes(length):
            return
        path = self._extent(name, offset, length)
        if _is_whole(path, length):
            touch(path)
            return
        with self._lock:
            if path in self._flights:
                return
            flight = self._flights[path] = _Flight()
        self._fetch(flight, path, name, offset, memoryview(bytearray(length)), to_keep=True)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes, as the store has it now."""
        return self._inner.size(name)

    def local_path(self, name: str) -> Path:
        """Return the path of the whole file in the cache; the manifest is fetched anew every time."""
        manifest = self._read_manifest() if name == MANIFEST else None
        path = self._root() / _WHOLE / name
        if manifest is not None and not _holds(path, manifest):
            self._folder.drop(path)
        if touch(path):
            return path
        size = self._inner.size(name) if manifest is None else len(manifest)
        with self._folder.room(path, size, force=True) as file:
            if file is not None:
                for block in blocks(self._inner, name) if manifest is None else [manifest]:
                    file.write(block)
                file.sync()
        return path if path.exists() else self._inner.local_path(name)

    def discard(self, name: str, offset: int = 0, length: int | None = None) -> None:
        """Drop an extent that turned out damaged, or the whole file if no length is given."""
        self._folder.drop(self._root() / _WHOLE / name if length is None else self._extent(name, offset, length))
        self._inner.discard(name, offset, length)

    def after_fork(self) -> None:
        """Take a lock of this process's own, and forget what the parent's threads fetch."""
        self._lock = threading.Lock()
        self._flights: dict[Path, _Flight] = {}

    def _root(self) -> Path:
        if self._base is None:
            self._read_manifest()
        assert self._base is not None
        return self._base

    def _extent(self, name: str, offset: int, length: int) -> Path:
        return self._root() / name / f"{offset}-{length}"

    def _read_manifest(self) -> bytes:
        manifest = b"".join(bytes(block) for block in blocks(self._inner, MANIFEST))
        key = hashlib.blake2b(self.location.encode() + b"\n" + manifest, digest_size=16).hexdigest()
        self._base = self._folder.path / key
        # Whole files are mapped into memory at the start of a run and not touched again: they would go first.
        self._folder.pinned = self._base / _WHOLE
        return manifest

    def _fetch(
        self, flight: _Flight, path: Path, name: str, offset: int, buffer: memoryview, *, to_keep: bool = False
    ) -> None:
        """Fill `buffer` and keep what is in it; `to_keep`: only if there is room for it."""
        fetched = False
        try:
            # It may have landed between the look and the flight.
            if not _load(path, buffer):
                with self._folder.room(path, len(buffer)) as file:
                    if file is None and to_keep:
                        return
                    self._inner.read_into(name, offset, buffer)
                    fetched = True
                    if file is not None:
                        file.write(buffer)
            fetched = True
        except InputError as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[path]
                if flight.waiting and fetched:
                    # The buffer is the caller's again as soon as this returns.
                    flight.data = bytes(buffer)
            flight.done.set()


def _load(path: Path, buffer: memoryview) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_size != len(buffer):
            return False
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], done)
            if not count:
                return False
            done += count
    except OSError:
        return False
    finally:
        os.close(descriptor)
    touch(path)
    return True


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
