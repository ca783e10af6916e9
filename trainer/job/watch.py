"""The watch over the time limit: a save is begun while there is time for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_STEPS = 2
_RECENT = 20
_MARGIN_SECONDS, _LARGEST_MARGIN = 60.0, 0.1
"""A minute, or a tenth of the time from begin to end where that is less: a short job must get somewhere too."""


class TimeWatch:
    """The time left before a limit, against what leaving takes."""

    def __init__(self, end_time: float | None, now: Callable[[], float] = time.time) -> None:
        """Watch for `end_time` in Unix seconds; None: there is no limit."""
        self._end, self._now = end_time, now
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._save = 0.0
        self._began = now()

    def move(self, end_time: float | None) -> None:
        """Watch for another limit: somebody has raised, lowered or lifted it."""
        self._end = end_time

    def note_step(self, seconds: float) -> None:
        """Take note of how long a step took, or whatever else lies between two looks at the clock."""
        self._steps.append(seconds)

    def note_save(self, seconds: float) -> None:
        """Take note of how long the last save took."""
        self._save = seconds

    def reason(self) -> str | None:
        """Return why to stop now: less time is left than two steps (the longest of late), a save and a minute take."""
        if self._end is None:
            return None
        left = self._end - self._now()
        margin = min(_MARGIN_SECONDS, _LARGEST_MARGIN * max(0.0, self._end - self._began))
        needed = _STEPS * max(self._steps, default=0.0) + self._save + margin
        if left >= needed:
            return None
        return f"before the time limit: {left:.0f} s are left, two steps, a save and a margin take {needed:.0f} s"
