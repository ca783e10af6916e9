"""The time limit of an attempt: when it is, and the alarm that goes off shortly before it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from launch.slurm.control import ControlError, SilentError, ask
from launch.slurm.options import seconds_of
from launch.slurm.requests import say

LIMIT = "SIGNSCALE_TIME_LIMIT"
"""Environment from the director to the node agents: the end in Unix seconds; empty: there is none."""
_NO_LIMIT = ("UNLIMITED", "INVALID", "NOT_SET")
_PATIENCE = 30.0
_SECONDS_TO_CONCLUDE, _LARGEST_PART = 20.0, 1 / 6
"""What a requeue takes on a busy cluster; of a short job a sixth of its time at most."""


class OutOfTimeError(Exception):
    """The attempt is still at work when its time is all but over."""


def find_end_time(job_id: str) -> float | None:
    """Return when SLURM ends this job, in Unix seconds; None: there is no limit, or SLURM does not tell it."""
    # From release 23 on; before that only the queue tells.
    if given := os.environ.get("SLURM_JOB_END_TIME"):
        return float(given)
    try:
        # The time left, not the time of day, which is written as its reader's time zone and format have it.
        answer = ask("squeue", "--noheader", "--jobs", job_id, "--format=%L", patience=_PATIENCE).strip()
    except (ControlError, SilentError) as error:
        say(f"SLURM does not tell the time limit ({error}); going by its warning alone")
        return None
    left = None if answer in _NO_LIMIT else seconds_of(answer)
    if left is None and answer not in _NO_LIMIT:
        say(f"squeue says {answer!r} for the time left, expected D-HH:MM:SS; going by SLURM's warning alone")
    return None if left is None else time.time() + left


@contextlib.contextmanager
def alarm(end_time: float | None) -> Iterator[None]:
    """Raise `OutOfTimeError` within the block some seconds before `end_time` (None: never).

    Whatever works past the limit is killed with the script that could have put the job back into the queue.
    """
    if end_time is None:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    left = max(0.0, end_time - time.time())
    before = signal.signal(signal.SIGALRM, ring)
    # Of 0 seconds it would never go off.
    signal.setitimer(signal.ITIMER_REAL, max(0.1, left - min(_SECONDS_TO_CONCLUDE, _LARGEST_PART * left)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
