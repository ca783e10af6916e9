"""A folder of files, bounded in total, that several processes fill at once and that survives their sudden end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import InputError

_USAGE = ".usage"
_TEMPORARY = ".tmp"
_KEEP = 0.9
"""Share of the limit that an eviction leaves, so that the folder is listed once in a while and not at every file."""


class BoundedFolder:
    """A folder of this node whose files stay within `limit_bytes` in all: the least recently used go first.

    Its total is kept in a file of the folder under a lock, with room taken before anything is written. A process may be
    killed at any moment: a file takes its name when it is whole, until then its writer holds a lock on it, which dies
    with the writer; a size that was not given back is found when the folder is listed next.

    Safe to use from several threads and after a fork.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make the folder; raises `InputError` if it cannot be written."""
        self.path = folder
        self.pinned: Path | None = None
        """A folder below, whose files are not dropped."""
        self._limit = limit_bytes
        self._stopped = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            with self._locked() as usage:
                _write_total(usage, self._evict(0, force=True))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"{folder}: the cache's folder cannot be written ({error.strerror or error}); let cache_dir name a "
                    "folder on this machine's own disk that can"
                ) from None
            self._stop(error)

    def takes(self, size: int) -> bool:
        """Tell whether a file of `size` bytes may be kept at all."""
        return not self._stopped and size <= self._limit

    @contextlib.contextmanager
    def room(self, path: Path, size: int, *, force: bool = False) -> Iterator[NewFile | None]:
        """Yield a file of `size` bytes to fill, which becomes `path` at the end; None if there is no room for it.

        `force` takes the room beyond the limit. A disk that is full or fails ends all keeping, with a warning, but
        neither the reading nor the run; whether the file was kept is whether its path exists.
        """
        file: NewFile | None = None
        try:
            if force or self.takes(size):
                file = self._reserve(path, size, force=force)
        except OSError as error:
            self._stop(error)
        if file is None:
            yield None
            return
        try:
            yield file
            # Under the lock: whoever lists the folder sees it by one of its names. Room is given back after it is
            # free, here as elsewhere: who is killed in between leaves a total too high, never one too low.
            with self._locked() as usage:
                replaced = _size(path)
                file.temporary.replace(path)
                _add_to_total(usage, -replaced)
            touch(path)
        except BaseException as error:
            self.drop(file.temporary)
            if not isinstance(error, OSError):
                raise
            self._stop(error)
        finally:
            os.close(file.descriptor)

    def drop(self, path: Path) -> None:
        """Remove a file, if it is there."""
        # A folder that cannot be written any more costs no run; what was not given back is found at the next listing.
        with contextlib.suppress(OSError), self._locked() as usage:
            size = _size(path)
            path.unlink(missing_ok=True)
            _add_to_total(usage, -size)

    def _reserve(self, path: Path, size: int, *, force: bool) -> NewFile | None:
        if self._stopped:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as usage:
            total = _read_total(usage)
            if total < 0 or total + size > self._limit:
                total = self._evict(size, force=force)
            if total + size > self._limit and not force:
                _write_total(usage, total)
                return None
            _write_total(usage, total + size)
            try:
                # Before the folder's lock is given back: another process that lists the folder counts it in full, and
                # knows that somebody writes it.
                return _create(path.parent, size)
            except OSError:
                _write_total(usage, total)
                raise

    def _evict(self, size: int, *, force: bool) -> int:
        """List the folder, drop what was used least recently if `size` bytes need it, and return the new total.

        Nothing is dropped in vain, if what may be dropped does not suffice, except for `force`.
        """
        total, known = 0, []
        pinned = None if self.pinned is None else f"{self.pinned}/"
        for path, status in files(self.path):
            if path.endswith(_TEMPORARY):
                if _is_orphan(path):
                    Path(path).unlink(missing_ok=True)
                    continue
            elif pinned is None or not path.startswith(pinned):
                known.append((status.st_mtime_ns, status.st_size, path))
            total += status.st_size
        most = sum(freed for _, freed, _ in known)
        if total + size <= self._limit or (total - most + size > self._limit and not force):
            return total
        for _, freed, path in sorted(known):
            if total + size <= self._limit * _KEEP:
                break
            Path(path).unlink(missing_ok=True)
            total -= freed
        return total

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        # Opened each time: a descriptor that threads share would share its lock, too.
        descriptor = os.open(self.path / _USAGE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            # A process forked at this moment holds a copy, which would keep the lock for as long as it lives.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _stop(self, error: OSError) -> None:
        first, self._stopped = not self._stopped, True
        if first:
            print(
                f"warning: {self.path}: nothing more is cached ({error.strerror or error}); reading goes on "
                "without, make room there for the next run",
                file=sys.stderr,
                flush=True,
            )


class NewFile:
    """A file that is being written; nobody else sees it."""

    def __init__(self, descriptor: int, temporary: Path) -> None:
        self.descriptor = descriptor
        self.temporary = temporary

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]

    def sync(self) -> None:
        """Have it on the disk before it gets its name, and no longer than what was written."""
        os.ftruncate(self.descriptor, os.lseek(self.descriptor, 0, os.SEEK_CUR))
        os.fsync(self.descriptor)


def _create(folder: Path, size: int) -> NewFile:
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=_TEMPORARY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        Path(temporary).unlink()
        raise
    return NewFile(descriptor, Path(temporary))


def touch(path: Path) -> bool:
    """Note that a file was used just now; tell whether it is there."""
    # The kernel's own clock ticks every few milliseconds, too coarse to order reads.
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except OSError:
        # Another process evicted it, or it is another user's: then it ages.
        return path.exists()
    return True


def files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the path and status of all files of a bounded folder that count, those being written included."""
    # No Path of each: a cache holds hundreds of thousands, and all its users wait for the list.
    folders = [str(folder)]
    while folders:
        # Somebody may clear the folder by hand.
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name != _USAGE:
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.path, entry.stat()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_orphan(path: str) -> bool:
    """Tell whether nobody writes a temporary file any more."""
    try:
        with Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _read_total(usage: int) -> int:
    """Read the folder's total; -1 if it is unknown."""
    text = os.pread(usage, 32, 0)
    return int(text) if text.isdigit() else -1


def _write_total(usage: int, total: int) -> None:
    # Of fixed width: one write replaces it all.
    os.pwrite(usage, b"%020d" % total, 0)


def _add_to_total(usage: int, size: int) -> None:
    total = _read_total(usage)
    # An unknown one stays so, until the folder is listed.
    if size and total >= 0:
        _write_total(usage, max(total + size, 0))
