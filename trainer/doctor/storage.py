"""Whether a node can write to the run directory, and rename there as checkpoints are published."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.doctor.finding import Finding, size
from trainer.files import sync_file, sync_folder

_PROBE_BYTES = 8 << 20
_LEAST_FREE = 1 << 30
_CHECKPOINTS = 2
"""A new checkpoint is complete before an old one goes, and the best one is kept beside the newest."""


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or what is there of its parents: looking must not create anything."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_storage(run: Path, node: str, *, needed: int = 0) -> Iterator[Finding]:
    """Write, replace and read back a file in the run directory; `needed`: bytes that training is known to write."""
    place = nearest_folder(run)
    name = "run directory"
    if not place.is_dir():
        yield Finding(
            check=name,
            value=f"{node}: {place} is a file",
            verdict="FAIL",
            mend="choose another --output_dir",
            nodes=(node,),
        )
        return
    try:
        speed = _replace(place, node)
    except OSError as error:
        yield Finding(
            check=name,
            value=f"{node}: {place} cannot be written ({error.strerror or error})",
            verdict="FAIL",
            mend="free space or mend the rights there, or choose another --output_dir",
            nodes=(node,),
        )
    else:
        yield Finding(
            check=name, value=f"{node}: {place} written, renamed and read back, {size(speed)}/s", nodes=(node,)
        )
    yield check_space(place, node, needed)


def check_space(place: Path, node: str, needed: int, *, check: str = "free disk") -> Finding:
    """Compare the free space with what training will write."""
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    wanted = max(needed, _LEAST_FREE)
    value = f"{node}: {size(free)} free at {place}" + (f", checkpoints take {size(needed)}" if needed else "")
    if free >= wanted:
        return Finding(check=check, value=value, nodes=(node,))
    # Without a recipe nobody knows what will be written: a full disk fails in any case, a small one may do.
    return Finding(
        check=check,
        value=value,
        verdict="FAIL" if needed or free < _PROBE_BYTES else "warn",
        mend=f"free {size(wanted - free)}, lower --keep_checkpoints, or choose another --output_dir",
        nodes=(node,),
    )


def checkpoint_bytes(parameters: int, states: int, keep: int) -> int:
    """Return what the checkpoints of a run take at most: weights and optimizer states in float32, and two over."""
    return 4 * parameters * (1 + states) * (keep + _CHECKPOINTS)


def _replace(place: Path, node: str) -> float:
    """Publish a file twice as a checkpoint is, and read the second; return bytes a second. Leaves nothing behind."""
    final = place / f".signscale-doctor-{node}-{os.getpid()}"
    temporary = final.with_name(f"{final.name}.aside")
    started = time.perf_counter()
    try:
        for content in (os.urandom(16), os.urandom(_PROBE_BYTES)):
            temporary.write_bytes(content)
            sync_file(temporary)
            temporary.replace(final)
            sync_folder(place)
        if final.read_bytes() != content:
            raise OSError("what is read back is not what was written")
    finally:
        # The disk's own error is what counts, not that of tidying up.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            final.unlink(missing_ok=True)
    return _PROBE_BYTES / (time.perf_counter() - started)
