"""What a rank knows of the job it is part of: whether it may publish, whether to stop, and where its last word goes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.errors import InputError, TrainingFailedError
from trainer.job.directory import ATTEMPT, END_TIME, JOB, TOKEN, JobDirectory, Word
from trainer.job.lock import RunLock
from trainer.job.plain import check_not_launched

_SECONDS_BETWEEN_LOOKS = 1.0
_LONGEST_REASON = 2000
_PAUSES = (0.1, 1.0)
"""Seconds until a file that could not be read is read again."""


class _Worker:
    """A process that works on runs, and holds the locks of those it has taken."""

    attempt = ""

    def __init__(self) -> None:
        self._locks: dict[Path, RunLock] = {}

    def take_run(self, run: Path, say: Callable[[str], None]) -> None:
        """Take the lock of a run directory, rank 0 alone; raises `InputError` if another process holds it."""
        if run not in self._locks:
            lock = RunLock(run, attempt=self.attempt, say=say)
            lock.acquire()
            self._locks[run] = lock

    def close(self) -> None:
        """Let go of all locks."""
        while self._locks:
            self._locks.popitem()[1].close()


class Job(_Worker):
    """A launched job, seen from one of its ranks."""

    def __init__(self, directory: JobDirectory, *, attempt: str, token: str, end_time: float | None) -> None:
        super().__init__()
        self.directory, self.attempt, self.token, self.end_time = directory, attempt, token, end_time
        self.tag = f".{attempt}"
        """Part of the names of what this attempt writes aside."""
        self._looked = float("-inf")

    def look_at_limit(self) -> None:
        """Read whether the time limit was moved since this rank began."""
        self.end_time = self.directory.moved_end(self.attempt, self.end_time)

    def check(self) -> None:
        """Raise `TrainingFailedError`, on this rank alone, if another attempt has become the owner of the run.

        Called right before each rename that publishes something: a rank that was cut off, or slept, changes nothing
        when it wakes up.
        """
        owner = self._owner()
        if owner != self.attempt:
            taken = f"another attempt ({owner}) has taken over from" if owner else "nothing names the owner beside"
            error = TrainingFailedError(
                f"{taken} this one ({self.attempt}); nothing was published ({self.directory.owner})"
            )
            error.local = True
            raise error

    def check_run(self, run: Path) -> None:
        """Check that this process may work on a run at all."""
        self.check()

    def stop_reason(self) -> str | None:
        """Return why the job is asked to stop, if it is; the files are looked at once a second at most.

        The file that tells of another `end_time` is among them.

        Raises `TrainingFailedError` if this attempt is no longer the owner.
        """
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return None
        self._looked = now
        self.check()
        self.look_at_limit()
        try:
            asked = self.directory.stop.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return " ".join(asked.split())[:200]

    def leave_word(self, word: Word, *, step: int | None, reason: str, code: int) -> None:
        """Leave the attempt's last word, unless another attempt has taken over."""
        line = " ".join(reason.split())[:_LONGEST_REASON]
        self.directory.leave_word(word, attempt=self.attempt, step=step, reason=line, code=code)

    def _owner(self) -> str | None:
        # A network's file system may remember for a minute what a name stood for; reading the folder makes it ask.
        with contextlib.suppress(FileNotFoundError):
            next(self.directory.folder.iterdir(), None)
        for pause in _PAUSES:
            try:
                return self.directory.owner_attempt()
            except InputError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
            # Such a file system may also fail to read a file that was replaced in that very moment.
            time.sleep(pause)
        return self.directory.owner_attempt()


class NoJob(_Worker):
    """What stands for the job where a command was typed and not launched."""

    token = ""
    tag = ""
    end_time: float | None = None

    def check(self) -> None:
        """Let everything be published: there is no other attempt."""

    def check_run(self, run: Path) -> None:
        """Refuse a run that a launched job works on."""
        check_not_launched(run)

    def stop_reason(self) -> str | None:
        """Return nothing: only signals ask such a process to stop."""
        return None

    def leave_word(self, word: Word, *, step: int | None, reason: str, code: int) -> None:
        """Leave nothing: nobody looks for it."""


NO_JOB = NoJob()
"""For parts that are used without a command around them."""


def find_job(environment: Mapping[str, str] = os.environ) -> Job | NoJob:
    """Return the job that the environment names. Raises `InputError` if it names one in part."""
    if JOB not in environment:
        return NoJob()
    problems = [f"{name}: not set, though {JOB} is; start ranks by signscale launch" for name in (ATTEMPT, TOKEN)]
    problems = [problem for problem in problems if not environment.get(problem.partition(":")[0])]
    end_time: float | None = None
    try:
        end_time = float(environment[END_TIME]) if environment.get(END_TIME) else None
    except ValueError:
        problems.append(f"{END_TIME}: expected Unix seconds, found {environment[END_TIME]!r}")
    if problems:
        raise InputError(problems)
    return Job(
        JobDirectory(Path(environment[JOB])),
        attempt=environment[ATTEMPT],
        token=environment[TOKEN],
        end_time=end_time,
    )
