"""One process group at a time works on a run: a lock that the system lifts when its holder is gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import InputError

LOCK = ".lock"
_NOT_OFFERED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""


class RunLock:
    """The lock on a run directory, which rank 0 holds for as long as it lives."""

    def __init__(self, run: Path, *, attempt: str, say: Callable[[str], None]) -> None:
        """Name who asks: an attempt of a launched job, or a plain command (an empty name)."""
        self.path = run / LOCK
        self._attempt, self._say = attempt, say
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, if it is not taken yet; the run directory exists. Raises `InputError` if another holds it.

        An attempt of a launched job owns the run by its job's record, and lets an older attempt keep a lock that it
        cannot give back from wherever it was cut off.
        """
        if self._descriptor is not None:
            return
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --output_dir"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._read(descriptor)
            os.close(descriptor)
            if self._attempt and holder.get("attempt"):
                self._say(f"{self.path}: attempt {holder['attempt']} has not let go of it; this one owns the run now")
                return
            raise InputError(
                f"{self.path.parent}: process {holder.get('pid', '?')} on {holder.get('host', 'some machine')} works "
                "on this run; wait for it, stop it (kill PID: it saves and leaves), or choose another --output_dir"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NOT_OFFERED:
                raise
            self._say(f"warning: {self.path}: this file system has no locks; see that no other command works here")
            return
        self._descriptor = descriptor
        who = {"host": platform.node(), "pid": os.getpid(), "attempt": self._attempt}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)

    def close(self) -> None:
        """Let go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self, descriptor: int) -> dict[str, Any]:
        try:
            return dict(json.loads(os.pread(descriptor, 4096, 0)))
        except (ValueError, TypeError):
            # Its holder is just writing it.
            return {}
