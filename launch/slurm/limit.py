"""The time limit of an attempt: when it is."""

from __future__ import annotations

import os
import time

from launch.slurm.control import ControlError, SilentError, ask
from launch.slurm.options import seconds_of
from launch.slurm.requests import say

LIMIT = "SIGNSCALE_TIME_LIMIT"
"""Environment from the director to the node agents: the end in Unix seconds; empty: there is none."""
_NO_LIMIT = ("UNLIMITED", "INVALID", "NOT_SET")
_PATIENCE = 30.0


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
