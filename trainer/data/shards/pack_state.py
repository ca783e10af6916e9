"""The folder in which a packing goes on: one process at a time, and only with what it was begun with."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.shards.pack_files import write_bytes
from trainer.data.shards.pack_source import Log
from trainer.errors import InputError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def begin(folder: Path, wanted: dict[str, Any], *, restart: bool, log: Log) -> None:
    """Note what is packed and how, or see that an earlier attempt wanted the same.

    `wanted` holds flags by their names, and `source`, a hash. Raises `InputError` if the earlier attempt differs.
    """
    state = folder / "state.json"
    if restart or not state.is_file():
        clear(folder)
        write_bytes(state, json.dumps(wanted, indent=1).encode())
        return
    begun = json.loads(state.read_bytes())
    changed = [
        f"--{name}: {begun.get(name)} then, {value} now"
        for name, value in wanted.items()
        if name != "source" and begun.get(name) != value
    ]
    if begun.get("source") != wanted["source"] and begun.get("splits") == wanted["splits"]:
        changed.append("clips of the source, or sizes or times of change of their files, are not what they were")
    if changed:
        raise InputError(
            f"{folder}: a packing was begun there with another source or other flags ({'; '.join(changed)}); "
            "give the same flags to go on, or --restart to begin anew"
        )
    log(f"{folder}: going on with the packing that was begun there")


@contextlib.contextmanager
def locked(folder: Path, log: Log) -> Iterator[None]:
    """Hold the folder, which exists; raises `InputError` if another process does, or other files lie there."""
    lock = folder / "lock"
    if not lock.exists() and any(folder.iterdir()):
        raise InputError(
            f"{folder}: expected what an earlier packing left there, found other files; give another OUT, or move them"
        )
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is packing there; wait for it, or end it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log(f"warning: {folder}: this file system has no locks; see that no other process packs there")
        yield
    finally:
        os.close(descriptor)


def clear(folder: Path) -> None:
    """Remove what an attempt left, but for the lock."""
    # Without its state, whatever else is left is known to be worthless.
    (folder / "state.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def remove(folder: Path) -> None:
    """Remove the folder, held by this process."""
    clear(folder)
    (folder / "lock").unlink()
    folder.rmdir()
