"""Requests to stop: a handler only sets a flag, which rides in the next fused all-reduce."""

from __future__ import annotations

import signal
from types import FrameType

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this rank was asked to stop; all ranks then save and leave at the same step."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Listen to the signals that launchers, schedulers and people send."""
        for number in _REQUESTS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            # Whoever presses Ctrl-C twice does not want to wait for the step.
            raise KeyboardInterrupt
        self.requested = True
