"""Where a packed corpus lies: a folder, or an object store with a node-local cache."""

from __future__ import annotations

import errno
import mmap
import os
import re
import threading
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from trainer.errors import InputError

_MOST_OPEN = 256
"""Files that a folder keeps open at once: a corpus may have more shards than a process may have files."""
_BLOCK = 16 << 20
_LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "ramfs", "overlay"}


class ShardStore(Protocol):
    """Reads byte ranges of the files of one packed corpus; names are relative, with `/`.

    Safe to use from several threads and after a fork. Every method raises `InputError` that names the file and the
    mend.
    """

    location: str

    @property
    def is_local(self) -> bool:
        """Whether a read costs no more than a disk's: if not, several at once hide how long each takes."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes, writable, contiguous) from `offset` on; a file that ends before is an error."""

    def view(self, name: str, offset: int, length: int) -> memoryview | None:
        """Return these bytes where they lie in memory already, read-only; None where they have to be read."""

    def warm(self, name: str, offset: int, length: int) -> None:
        """Make these bytes fast to read soon; a store that can keep nothing does nothing."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

    def local_path(self, name: str) -> Path:
        """Return a path of the whole file on this machine (an index to be memory-mapped), fetched if need be."""

    def discard(self, name: str, offset: int = 0, length: int | None = None) -> None:
        """Drop what a cache holds of these bytes, of the whole file without a length: they failed their checksum.

        What is read next comes from where the corpus lies; a store that keeps nothing does nothing.
        """


class LocalStore:
    """A folder of this machine or of a shared file system."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder
        self._files: dict[str, _File] = {}
        self._maps = True
        self.after_fork()
        reset_after_fork(self)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        done = 0
        try:
            file = self._open(name)
            while done < len(buffer):
                # Straight into the caller's buffer: no page of a mapping to fault in, no copy of our own.
                count = os.preadv(file.descriptor, [buffer[done:]], offset + done)
                if not count:
                    raise EOFError
                done += count
        except EOFError:
            raise InputError(
                f"{self._folder / name}: expected {offset + len(buffer)} bytes or more, found {offset + done}; the "
                "file is cut short: copy it again or pack the corpus anew"
            ) from None
        except OSError as error:
            raise _describe(self._folder / name, error) from None

    def view(self, name: str, offset: int, length: int) -> memoryview | None:
        """Return these bytes in the kernel's own copy of the file: a fifth of the time of a record goes into copying.

        Not on a network's file system, where a fault in the middle of a mapping would kill the process, and not of a
        file that changed since it was opened: shards must not be rewritten in place while a run reads them.
        """
        if not self._maps:
            return None
        try:
            file = self._open(name)
            if not file.is_local or not file.is_as_opened() or file.size < offset + length:
                # What lies beyond the end of a file must not be touched; reading says so in words.
                return None
            return file.mapping()[offset : offset + length]
        except OSError:
            # No address space is left, say: reading goes on without, and reports what is wrong with the file.
            self._maps = False
            return None

    def warm(self, name: str, offset: int, length: int) -> None:
        """Have the kernel read these bytes ahead."""
        if not length:
            # The kernel would take it for all the rest of the file.
            return
        try:
            os.posix_fadvise(self._open(name).descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise _describe(self._folder / name, error) from None

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        try:
            return (self._folder / name).stat().st_size
        except OSError as error:
            raise _describe(self._folder / name, error) from None

    def local_path(self, name: str) -> Path:
        """Return the path of a file."""
        return self._folder / name

    def discard(self, name: str, offset: int = 0, length: int | None = None) -> None:
        """Do nothing: nothing is kept here."""

    def after_fork(self) -> None:
        """Take a lock of this process's own."""
        self._lock = threading.Lock()

    def _open(self, name: str) -> _File:
        file = self._files.get(name)
        if file is None:
            # Outside the lock: on a shared file system it takes milliseconds, and other threads need other files.
            path = self._folder / name
            file = _File(os.open(path, os.O_RDONLY), is_local=is_on_local_disk(path.resolve().parent))
            with self._lock:
                while len(self._files) >= _MOST_OPEN:
                    del self._files[next(iter(self._files))]
                self._files[name] = file
        return file


class _File:
    """An open file, which closes when its last reader lets it go."""

    def __init__(self, descriptor: int, *, is_local: bool) -> None:
        self.descriptor, self.is_local = descriptor, is_local
        self._view: memoryview | None = None
        status = os.fstat(descriptor)
        self.size, self._changed = status.st_size, status.st_mtime_ns

    def is_as_opened(self) -> bool:
        """Tell whether nobody has written to the file since."""
        status = os.fstat(self.descriptor)
        return (status.st_size, status.st_mtime_ns) == (self.size, self._changed)

    def mapping(self) -> memoryview:
        """Map the whole file."""
        if self._view is None:
            self._view = memoryview(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ))
        return self._view

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=64)
def is_on_local_disk(folder: Path) -> bool:
    """Tell whether a folder's file system belongs to this machine; one that is not known to does not."""
    path, best, kind = str(folder), "", ""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    for escaped, found in (line.split()[1:3] for line in mounts):
        # The kernel writes blanks in names as octal numbers.
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped)
        inside = place == "/" or path == place or path.startswith(f"{place}/")
        if inside and len(place) >= len(best):
            best, kind = place, found
    return kind in _LOCAL_FILE_SYSTEMS


def _describe(path: Path, error: OSError) -> InputError:
    if error.errno == errno.ENOENT:
        return InputError(f"{path}: expected a file of the packed corpus, found none; copy it again or pack anew")
    return InputError(f"{path}: cannot be read ({error.strerror or error}); mend the path or its rights")


def blocks(store: ShardStore, name: str) -> Iterator[memoryview]:
    """Yield a store's file in blocks; each is valid until the next."""
    size = store.size(name)
    block = memoryview(bytearray(min(size, _BLOCK)))
    for offset in range(0, size, _BLOCK):
        part = block[: min(_BLOCK, size - offset)]
        store.read_into(name, offset, part)
        yield part


class Forkable(Protocol):
    """Holds something that a forked process must not share with its parent."""

    def after_fork(self) -> None:
        """Let go of it, in the forked process."""


def reset_after_fork(thing: Forkable) -> None:
    """Have `thing.after_fork` called in every process forked from this one while the thing lives."""
    _forkable.add(thing)


_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()


def _after_fork() -> None:
    for thing in list(_forkable):
        thing.after_fork()


# At the fork, not at the next use: by then the child may have torn down what the parent still needs, or may wait for a
# lock that a thread of the parent held at that moment.
os.register_at_fork(after_in_child=_after_fork)


def open_store(location: str, *, cache_dir: str = "", cache_gb: float = 50.0) -> ShardStore:
    """Open the packed corpus at a folder, or at an address such as `s3://bucket/corpus`.

    An address is read through a cache of at most `cache_gb` (10^9 bytes) in `cache_dir`, which is `~/.cache/signscale`
    unless given; a folder only if `cache_dir` is given, as for a slow shared file system. Raises `InputError` for a
    cache that cannot be written.
    """
    remote = "://" in location
    if not remote and not cache_dir:
        return LocalStore(Path(location))
    if cache_gb <= 0:
        raise InputError(f"cache_gb: expected a size above 0, found {cache_gb:g}; give the cache some room")
    # Imported where it is used: a plain folder needs neither.
    from trainer.data.shards.cache import CachedStore
    from trainer.data.shards.remote import RemoteStore

    inner = RemoteStore(location) if remote else LocalStore(Path(location))
    folder = Path(cache_dir).expanduser() if cache_dir else _default_cache()
    return CachedStore(inner, folder, int(cache_gb * 1e9))


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "signscale"
