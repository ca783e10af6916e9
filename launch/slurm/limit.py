"""The time limit of an attempt: when it is, whether it was moved, and the alarm that goes off shortly before it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

from launch.slurm.control import ControlError, SilentError, ask
from launch.slurm.options import seconds_of
from launch.slurm.requests import REQUESTS, say

LIMIT = "SIGNSCALE_TIME_LIMIT"
"""Environment from the director to the node agents: the end in Unix seconds; empty: there is none."""
_NO_LIMIT = "UNLIMITED"
_PATIENCE = 30.0
_SECONDS_TO_CONCLUDE, _LARGEST_PART = 20.0, 1 / 6
"""What a requeue takes on a busy cluster; of a short job a sixth of its time at most."""
_LONGEST_PAUSE, _SHORTEST_PAUSE, _PART_OF_REST = 180.0, 5.0, 0.1
"""Between two looks for a limit that was moved: three minutes, and less where less is left."""
_MOVED = 30.0
"""Seconds by which an end differs that was moved: limits are whole minutes, the time left is whole seconds."""


class OutOfTimeError(Exception):
    """The attempt is still at work when its time is all but over."""


def find_end_time(job_id: str) -> float | None:
    """Return when SLURM ends this job, in Unix seconds; None: there is no limit, or SLURM does not tell it."""
    # From release 23 on; before that only the queue tells.
    if given := os.environ.get("SLURM_JOB_END_TIME"):
        return float(given)
    try:
        return _ask_end_time(job_id, patience=_PATIENCE)
    except (ControlError, SilentError) as error:
        say(f"SLURM does not tell the time limit ({error}); going by its warning alone")
        return None


def _ask_end_time(job_id: str, *, patience: float) -> float | None:
    """Ask the queue; None: there is no limit. Raises `ControlError` where it does not tell, `SilentError`."""
    # The time left, not the time of day, which is written as its reader's time zone and format have it.
    answer = ask("squeue", "--noheader", "--jobs", job_id, "--format=%L", patience=patience).strip()
    left = seconds_of(answer)
    if left is None and answer != _NO_LIMIT:
        raise ControlError(f"squeue says {answer!r} for the time left, expected D-HH:MM:SS")
    return None if left is None else time.time() + left


class Alarm:
    """Raises `OutOfTimeError` within its block some seconds before the end of the attempt (None: never).

    Whatever works past the limit is killed with the script that could have put the job back into the queue.
    """

    def __init__(self, end_time: float | None) -> None:
        """Set it to an end in Unix seconds."""
        self._end_time, self._began = end_time, time.time()
        self._open = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._ring)
        self._open = True
        self.move(self._end_time)
        return self

    def __exit__(self, *_: object) -> None:
        # From here on one that rings is not heard.
        self._open = False
        with self._lock:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def move(self, end_time: float | None) -> None:
        """Set it to another end; from any thread, and to no avail once the block is left."""
        seconds = 0.0
        if end_time is not None:
            to_conclude = min(_SECONDS_TO_CONCLUDE, _LARGEST_PART * max(0.0, end_time - self._began))
            # Of 0 seconds it would never go off.
            seconds = max(0.1, end_time - time.time() - to_conclude)
        with self._lock:
            if self._open:
                signal.setitimer(signal.ITIMER_REAL, seconds)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            raise OutOfTimeError


class LimitWatch:
    """Asks the queue now and then whether the limit was moved (`scontrol update TimeLimit`), from a thread of its own.

    One for the whole job. A controller that does not answer changes nothing.
    """

    def __init__(self, job_id: str, end_time: float | None, moved: Callable[[float | None], None]) -> None:
        """Watch an end in Unix seconds (None: there is none); `moved` is called with each new one."""
        self._job_id, self._end_time, self._moved = job_id, end_time, moved
        self._over = threading.Event()

    def __enter__(self) -> Self:
        # These are for the thread that leads: it must wake up, and later waits for one of them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [*REQUESTS, signal.SIGALRM])
        try:
            threading.Thread(target=self._watch, daemon=True).start()
        except RuntimeError as error:
            say(f"a time limit that is moved will not be seen ({error})")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *_: object) -> None:
        # Not waited for: it may be asking a controller that is silent for a minute.
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._pause()):
            try:
                found = _ask_end_time(self._job_id, patience=0.0)
            except SilentError:
                continue
            except ControlError as error:
                say(f"a time limit that is moved from now on will not be seen: {error}")
                return
            if not self._over.is_set() and self._is_another(found):
                self._end_time = found
                self._moved(found)

    def _pause(self) -> float:
        left = float("inf") if self._end_time is None else self._end_time - time.time()
        return max(_SHORTEST_PAUSE, min(_LONGEST_PAUSE, _PART_OF_REST * left))

    def _is_another(self, found: float | None) -> bool:
        if found is None or self._end_time is None:
            return found is not self._end_time
        return abs(found - self._end_time) >= _MOVED
