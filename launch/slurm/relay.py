"""The output of an attempt: into its log and on, without the launcher's complaints about a successful end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

_LABEL = re.compile(rb"^(\s*\d+: )?(.*)$", re.DOTALL)
_COMPLAINT = re.compile(rb"Error waiting on exit barrier|recvValueWithTimeout failed|sendBytes failed|recvBytes")
_MORE = re.compile(
    rb"^(\[?[A-Z]\d{4} .*\] *)?(\s*$|  |frame #\d+|Exception raised from|Traceback|During handling|The above exception"
    rb"|torch\.distributed\.Dist\w*Error)"
)
"""Lines of the trace under a complaint."""

_TROUBLE = re.compile(r"\b\w*(?:Error|Exception)\b|\berror:|\bfailed:|\bKilled\b|[Oo]ut of memory|oom")
_SCHEDULER = re.compile(r"(?:\d+: )?(?:srun|slurmstepd)[:-]")
_NOTICE = re.compile(
    r"\*\*\* (?:STEP|JOB) .* CANCELLED AT \S+(?: DUE TO (TIME LIMIT|PREEMPTION|JOB REQUEUE|NODE FAILURE))?"
)
_READ_BACK = 64 * 1024


class ExitNoise:
    """Whether a line is the launcher's complaint that, when all was done, another node left before it.

    The node that holds the launcher's store leaves with the others still listening; they take it for a failure and
    print a long trace, which people take for one. Before the last word is DONE the same lines are no noise.
    """

    def __init__(self, done: Callable[[], bool]) -> None:
        """Take what tells whether the attempt has left DONE."""
        self._done = done
        self._complaining: set[bytes] = set()
        self.lines = 0
        """Lines found so far."""

    def __call__(self, line: bytes) -> bool:
        """Judge the next line, srun's label included."""
        match = _LABEL.match(line)
        assert match is not None
        label, text = match[1] or b"", match[2]
        if _COMPLAINT.search(text) and self._done():
            self._complaining.add(label)
        elif label not in self._complaining:
            return False
        elif not _MORE.match(text):
            self._complaining.discard(label)
            return False
        self.lines += 1
        return True


def relay(source: IO[bytes], log: Path, onward: IO[bytes], is_noise: ExitNoise) -> None:
    """Copy line by line until the source ends; the log is appended to."""
    with log.open("ab") as file:
        for line in source:
            if is_noise(line):
                continue
            for target in (file, onward):
                target.write(line)
                target.flush()


def notice_of_cancellation(log: Path) -> str | None:
    """Return why SLURM ended the step: TIME LIMIT, PREEMPTION, NODE FAILURE, …; empty: scancel; None: it did not."""
    notices = [match[1] for line in _last_lines(log) if (match := _NOTICE.search(line))]
    return notices[-1] or "" if notices else None


def telling_line(log: Path) -> str:
    """Return the last line of a log that speaks of a failure, else its last line; empty where it says nothing."""
    lines = _last_lines(log)
    # srun's report that a task has failed comes last and says least.
    own = [line for line in lines if not _SCHEDULER.match(line)]
    told = [line for line in own if _TROUBLE.search(line)] or lines[-1:]
    return told[-1][:300] if told else ""


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _READ_BACK))
            return [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
