"""Worker processes of the packing: tasks in, results as they come, an end to every kind of end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

from trainer.errors import TrainingFailedError
from trainer.signals import StopRequest

Task = TypeVar("Task")
Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_POLL_SECONDS = 0.1


class StoppedError(Exception):
    """Tell that somebody asked the command to stop."""


class WorkerPool:
    """Processes that take tasks; none starts before the first task.

    Signals to stop are noted while the pool is open and end the next `run` by a `StoppedError`.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._stop = StopRequest()
        self._executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)

    def __enter__(self) -> WorkerPool:
        self._stop.install()
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            self._executor.shutdown(cancel_futures=True)
        finally:
            self._stop.uninstall()

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, as they are done.

        Tasks are drawn when a worker can soon take them, so that no more than a few per worker wait. Raises what a
        task raises, `StoppedError` on a signal, and `TrainingFailedError` if a worker dies.
        """
        remaining = iter(tasks)
        pending: dict[Future[Result], Task] = {}
        try:
            while True:
                while len(pending) < 3 * self.workers:
                    try:
                        task = next(remaining)
                    except StopIteration:
                        break
                    pending[self._submit(function, task)] = task
                if not pending:
                    return
                done, _ = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                if self._stop.requested:
                    raise StoppedError
                for future in done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool:
            raise TrainingFailedError(
                "a worker process ended by itself: it was killed, perhaps for want of memory; the same command goes on "
                f"where this one ended, if need be with fewer than --workers {self.workers}"
            ) from None

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        # A worker inherits the mask: Ctrl-C and a scheduler's signals go to all processes, but only one answers.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return self._executor.submit(function, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _follow_parent() -> None:
    """End this worker with its parent: one that was killed cannot say good-bye."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        with contextlib.suppress(OSError):
            connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
