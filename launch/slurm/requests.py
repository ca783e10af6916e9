"""SLURM's signals to a batch script, passed on to the ranks as one request to stop."""

from __future__ import annotations

import signal
from types import FrameType

from trainer.job.directory import JobDirectory

REQUESTS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def say(text: str) -> None:
    """Print a line of the director's own."""
    print(f"signscale: {text}", flush=True)


class StopRequests:
    """Writes STOP at the first signal, once the attempt has begun; a signal to srun would end the ranks at once."""

    def __init__(self, job: JobDirectory, attempt: str) -> None:
        self._job, self._attempt = job, attempt
        self._number: int | None = None
        self._passed_on = False
        self._open = False
        for number in REQUESTS:
            signal.signal(number, self._note)

    def open(self) -> None:
        """Pass requests on from now on, and the one that came before."""
        self._open = True
        self._pass_on()

    def close(self) -> None:
        """Hear no more: the ranks have left, and what SLURM is asked from now on must outlive its own signals."""
        self._open = False
        # Unlike a handler, this also holds for the commands that are started.
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        self._pass_on()

    def _pass_on(self) -> None:
        # The attempt after this one must not be stopped by what was meant for this one.
        if self._open and self._number and not self._passed_on and self._job.owner_attempt() == self._attempt:
            self._passed_on = True
            name = signal.Signals(self._number).name
            say(f"{name} of SLURM (time limit, preemption or scancel): asking the ranks to save and leave")
            self._job.request_stop(f"{name} of SLURM")


def forget_terminations() -> None:
    """Drop the SIGTERM that came while none was heard."""
    while signal.sigtimedwait([signal.SIGTERM], 0):
        pass


def await_termination(seconds: float) -> bool:
    """Wait until SLURM ends this process; False where it does not."""
    return signal.sigtimedwait([signal.SIGTERM], seconds) is not None
