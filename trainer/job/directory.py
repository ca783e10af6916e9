"""RUN/job: what a launched command was asked to do, who works on it now, and how each attempt at it ended.

The launcher, the batch job and the ranks meet here alone: no exit code survives srun and accelerate, files do.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.errors import InputError
from trainer.files import write_json, write_text

JOB, ATTEMPT, TOKEN, END_TIME = (
    "SIGNSCALE_JOB",
    "SIGNSCALE_ATTEMPT",
    "SIGNSCALE_JOB_TOKEN",
    "SIGNSCALE_END_TIME",
)
"""Environment of a launched rank: RUN/job, the attempt's name, the token all ranks compare, the time limit (Unix s)."""

Word = Literal["DONE", "RESUME", "FAILED"]
WORDS: tuple[Word, ...] = ("DONE", "RESUME", "FAILED")
"""The last word of an attempt: all done; saved and to be gone on with; failed in a way that another try repeats."""


@dataclass(frozen=True, kw_only=True)
class LastWord:
    """What an attempt says as it leaves."""

    word: Word
    attempt: str
    step: int | None
    """Optimizer steps done in all (None: the command takes no steps)."""
    reason: str
    """One line for people."""
    time: float
    """Unix seconds."""
    code: int = 0
    """Exit code of the command; 1 beside DONE: done, but not as well as was asked for (--target_wer, --max_wer)."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt, as its beginning and its end were recorded."""

    attempt: str
    """SLURM: JOBID[_TASK].RESTARTS; otherwise local-…"""
    began: float
    """Unix seconds."""
    job_id: str | None = None
    """As squeue names it, array task included."""
    nodes: str | None = None
    host: str | None = None
    pid: int | None = None
    """Of the process that leads the attempt, on `host`."""
    ended: float | None = None
    word: Word | None = None
    """None after `ended`: the attempt left without a word."""
    step: int | None = None
    """Newest step known to be saved when the attempt ended."""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cancellation:
    """Somebody's wish that the job end for good: no requeue, no resubmission, no further attempt."""

    reason: str
    """One line for people: who, from where."""
    time: float
    """Unix seconds."""


class JobDirectory:
    """The files of RUN/job. Every write is atomic; a reader needs no lock."""

    def __init__(self, folder: Path) -> None:
        """Take `folder`, which is RUN/job itself (see `of`); nothing is created."""
        self.folder = folder
        self.plan = folder / "plan.json"
        """What `signscale launch` resolved."""
        self.script = folder / "job.sh"
        """The batch script, as submitted."""
        self.snapshot = folder / "snapshot"
        """The code, as it was when submitted."""
        self.submissions = folder / "submissions.jsonl"
        """One line per submission: {"job_id", "time", "cluster", "after"}."""
        self.attempts = folder / "attempts.jsonl"
        self.owner = folder / "owner.json"
        self.stop = folder / "STOP"
        self.cancellation = folder / "CANCELLED"
        """There while the job is not to be gone on with, whatever its last word; launching again removes it."""
        self.logs = folder / "logs"
        """logs/<attempt>.log is everything said; logs/<attempt>/ holds the launcher's files per rank."""

    @classmethod
    def of(cls, run: Path) -> JobDirectory:
        """Return the job directory of a run."""
        return cls(run / "job")

    def begin(self, record: AttemptRecord) -> None:
        """Make an attempt the owner: from here on no older one may publish. Clears words and requests of older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.owner, {"attempt": record.attempt})
        for stale in (*(self.folder / word for word in WORDS), self.stop):
            stale.unlink(missing_ok=True)
        if cancelled := self.cancelled():
            # Cancelled while it waited: the STOP just removed was meant for this attempt.
            self.request_stop(cancelled.reason)
        self._add(self.attempts, {"event": "begin"} | asdict(record))

    def end(self, attempt: str, *, step: int | None, word: Word | None, reason: str) -> None:
        """Record how an attempt ended."""
        line = {"event": "end", "attempt": attempt, "ended": time.time(), "step": step, "word": word, "reason": reason}
        self._add(self.attempts, line)

    def history(self) -> list[AttemptRecord]:
        """List the attempts, oldest first."""
        found: dict[str, dict[str, Any]] = {}
        for line in read_lines(self.attempts):
            found.setdefault(line["attempt"], {}).update(
                {key: value for key, value in line.items() if key != "event" and value is not None}
            )
        return [AttemptRecord(**fields) for fields in found.values() if "began" in fields]

    def owner_attempt(self) -> str | None:
        """Name the attempt that may publish; None where nothing was launched."""
        try:
            return str(json.loads(self.owner.read_text(encoding="utf-8"))["attempt"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.owner}: cannot be read ({error}); launch the job again") from error

    def leave_word(self, word: Word, *, attempt: str, step: int | None, reason: str, code: int = 0) -> None:
        """Leave an attempt's last word; one that is no longer the owner leaves none."""
        if self.owner_attempt() == attempt:
            said = LastWord(word=word, attempt=attempt, step=step, reason=reason, time=time.time(), code=code)
            write_json(self.folder / word, asdict(said))

    def last_word(self) -> LastWord | None:
        """Read the last word; of several the weightiest: FAILED, then DONE, then RESUME."""
        for word in ("FAILED", "DONE", "RESUME"):
            try:
                return LastWord(**json.loads((self.folder / word).read_text(encoding="utf-8")))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{self.folder / word}: cannot be read ({error}); delete it") from error
        return None

    def request_stop(self, reason: str) -> None:
        """Ask the attempt that works now to save and leave; rank 0 looks for this between steps."""
        write_text(self.stop, reason + "\n")

    def cancel(self, reason: str) -> None:
        """Ask for the end of the whole job: the attempt that works now saves and leaves, and no other follows it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # In this order: whoever sees STOP obeyed must already find that the job is not to go on.
        write_json(self.cancellation, asdict(Cancellation(reason=reason, time=time.time())))
        self.request_stop(reason)

    def cancelled(self) -> Cancellation | None:
        """Tell whether the job was cancelled since it was launched; whoever would requeue or submit it asks first."""
        try:
            return Cancellation(**json.loads(self.cancellation.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.cancellation}: cannot be read ({error}); delete it to launch again") from error

    def withdraw_cancellation(self) -> None:
        """Launch again what was cancelled: forget the wish, and the request to stop that came with it."""
        if self.cancellation.exists():
            self.stop.unlink(missing_ok=True)
            self.cancellation.unlink()

    def move_end(self, attempt: str, end_time: float | None) -> None:
        """Tell the ranks of an attempt that its time ends elsewhere than they were told (None: nowhere)."""
        write_json(self._end_of(attempt), {"end_time": end_time})

    def moved_end(self, attempt: str, told: float | None) -> float | None:
        """Return when an attempt's time ends, in Unix seconds, if its ranks were `told` this at their start."""
        try:
            found = json.loads(self._end_of(attempt).read_text(encoding="utf-8"))["end_time"]
            return None if found is None else float(found)
        except (OSError, ValueError, KeyError, TypeError):
            # Nearly always it was not moved. A file that cannot be read now can be so in a second.
            return told

    def _end_of(self, attempt: str) -> Path:
        # A name of its own for each: an attempt that was cut off must not speak for the one that took over.
        return self.folder / f"end-{attempt}.json"

    def add_submission(self, job_id: str, **fields: Any) -> None:
        """Record a submission."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._add(self.submissions, {"job_id": job_id, "time": time.time()} | fields)

    def _add(self, path: Path, line: dict[str, Any]) -> None:
        # One write with O_APPEND: lines of two writers never mix.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a file that is not there has none. Raises `InputError` naming a damaged line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{number}: expected a line of JSON; remove this line") from error
    return lines
