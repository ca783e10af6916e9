"""Whether the process that leads an attempt on this machine still lives."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from trainer.job.directory import AttemptRecord

_SLACK_SECONDS = 5.0
"""A process starts a moment before it records its attempt; clock ticks and the boot time are rounded."""


def is_here(attempt: AttemptRecord) -> bool:
    """Tell whether the attempt's process is one of this machine's."""
    return attempt.pid is not None and attempt.host == platform.node()


def is_alive(attempt: AttemptRecord) -> bool:
    """Tell whether the attempt's process lives; one that got the same number later is told apart by its age.

    The attempt must be of this machine (`is_here`).
    """
    assert attempt.pid is not None
    try:
        os.kill(attempt.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _started(attempt.pid)
    return started is None or started <= attempt.began + _SLACK_SECONDS


def _started(pid: int) -> float | None:
    """Return when a process started, in Unix seconds; None where the system does not tell, inf for one that is gone."""
    try:
        # The name in parentheses may hold anything; what follows it are plain fields, the state first.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines()
            if line.startswith("btime ")
        )
    except (OSError, StopIteration):
        return None if not Path("/proc/self/stat").exists() else float("inf")
    if fields[0] in ("Z", "X"):
        return float("inf")
    return boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
