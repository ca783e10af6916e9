"""Requests to stop: a flag that a handler sets, a file, or the clock; it rides in the next fused all-reduce."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from trainer.job.rank import NO_JOB, Job, NoJob
from trainer.job.watch import TimeWatch

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this rank was asked to stop; all ranks then save and leave at the same step."""

    def __init__(self, job: Job | NoJob = NO_JOB, *, leads: bool = True) -> None:
        """Listen for signals; where this rank `leads`, look for the job's requests and at its time limit too."""
        self._job, self._leads = job, leads
        self.time = TimeWatch(job.end_time if leads else None)
        # Two places: a handler may run between any two instructions.
        self._signal: signal.Signals | None = None
        self._asked: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Tell whether to stop. Raises `TrainingFailedError` if another attempt has taken the run over."""
        if self._signal is None and self._asked is None and self._leads:
            asked = self._job.stop_reason()
            self.time.move(self._job.end_time)
            self._asked = self.time.reason() if asked is None else f"on request ({asked})"
        return self._signal is not None or self._asked is not None

    @property
    def reason(self) -> str:
        """Return why, as far as this rank knows; another one may have been asked."""
        if self._asked is not None:
            return self._asked
        return "on request" if self._signal is None else f"on request ({self._signal.name})"

    def install(self) -> None:
        """Listen to the signals that launchers, schedulers and people send."""
        for number in _REQUESTS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                # nohup: the terminal may go.
                continue
            self._before[number] = signal.signal(number, self._note)

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            # Whoever presses Ctrl-C twice does not want to wait for the step.
            raise KeyboardInterrupt
        # Any other may come as often as it likes: preemption sends SIGTERM twice, a launcher passes on what it got.
        self._signal = self._signal or signal.Signals(number)
