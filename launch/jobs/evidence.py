"""All that is known of one run: gathered here, judged elsewhere."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.jobs.queue import JobsOfRun, Queue
from launch.pipeline.record import find_lacking
from trainer.errors import InputError
from trainer.job.directory import AttemptRecord, Cancellation, JobDirectory, LastWord, read_lines

_TASK = re.compile(r"\d+_(\d+)\.\d+$")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What files and SLURM tell of one run, or of one task of an array."""

    run: Path
    directory: JobDirectory
    plan: dict[str, Any] | None
    """As plan.json has it; None where nothing was launched, or where it is being written."""
    submissions: tuple[dict[str, Any], ...] = ()
    attempts: tuple[AttemptRecord, ...] = ()
    """Oldest first."""
    word: LastWord | None = None
    cancelled: Cancellation | None = None
    stop_asked: bool = False
    lacking: tuple[str, ...] = ()
    """Of a pipeline's stage: which stages before it are not done, and why."""
    known: JobsOfRun = field(default_factory=JobsOfRun)
    now: float = field(default_factory=time.time)

    @property
    def newest(self) -> AttemptRecord | None:
        """Return the newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def saved(self) -> int:
        """Return the newest step that an ended attempt saved."""
        return max((record.step for record in self.attempts if record.step is not None), default=0)

    @property
    def log(self) -> Path | None:
        """Return the log of the newest attempt."""
        return self.directory.logs / f"{self.newest.attempt}.log" if self.newest else None


def read_plan(directory: JobDirectory) -> dict[str, Any] | None:
    """Read plan.json; None where there is none yet. Raises `InputError` where it is damaged."""
    try:
        plan = json.loads(directory.plan.read_text(encoding="utf-8"))
        if not isinstance(plan, dict):
            raise ValueError("not an object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{directory.plan}: cannot be read ({error}); launch the job again") from error
    return plan


def check_task(task: int | None, tasks: Sequence[Any]) -> None:
    """Raise `InputError` unless an array of these tasks has this one; None is no task."""
    if task is not None and task >= len(tasks):
        there = f"expected 0 to {len(tasks) - 1}" if tasks else "the job is no array; leave --task out"
        raise InputError(f"--task {task}: no such task; {there}")


def read_submissions(directory: JobDirectory) -> list[dict[str, Any]]:
    """Read the submissions, oldest first. Raises `InputError` naming a damaged line."""
    lines = read_lines(directory.submissions)
    for number, line in enumerate(lines, 1):
        if not isinstance(line.get("job_id"), str) or not isinstance(line.get("time"), int | float):
            raise InputError(f"{directory.submissions}:{number}: expected job_id and time; remove this line")
    return lines


def read_evidence(run: Path, queue: Queue | None = None) -> Evidence:
    """Read a run; without a queue, its submissions alone are asked for."""
    directory = JobDirectory.of(run)
    submissions = read_submissions(directory)
    return gather(run, directory, read_plan(directory), submissions, queue or Queue(submissions), None)


def read_tasks(whole: Evidence, queue: Queue) -> list[Evidence]:
    """Read the tasks of an array; a job that is none has none."""
    tasks = (whole.plan or {}).get("tasks") or []
    return [
        gather(Path(task["run"]), whole.directory, whole.plan, whole.submissions, queue, number)
        for number, task in enumerate(tasks)
    ]


def gather(
    run: Path,
    submitter: JobDirectory,
    plan: dict[str, Any] | None,
    submissions: Sequence[dict[str, Any]],
    queue: Queue,
    task: int | None,
) -> Evidence:
    """Put together what is known; a task's attempts are in its own run, its submissions in the array's."""
    own = submitter if task is None else JobDirectory.of(run)
    lines = list(submissions) if task is None else [*submissions, *read_submissions(own)]
    cancelled = own.cancelled() or (submitter.cancelled() if task is not None else None)
    return Evidence(
        run=run,
        directory=own,
        plan=plan,
        submissions=tuple(lines),
        attempts=tuple(_attempts(own, submitter, task)),
        word=_word(own, submitter, task),
        cancelled=cancelled,
        stop_asked=own.stop.exists(),
        lacking=tuple(find_lacking(own)),
        known=queue.jobs_of(submitter, lines, task),
    )


def _word(own: JobDirectory, submitter: JobDirectory, task: int | None) -> LastWord | None:
    """Read the last word; a task that failed before its run was there has left it with the array's."""
    word = own.last_word()
    if word is not None or task is None:
        return word
    word = submitter.last_word()
    match = _TASK.match(word.attempt) if word is not None else None
    return word if match and int(match[1]) == task else None


def _attempts(own: JobDirectory, submitter: JobDirectory, task: int | None) -> list[AttemptRecord]:
    try:
        mine = own.history()
    except (TypeError, KeyError) as error:
        raise InputError(f"{own.attempts}: a line is no record of an attempt ({error}); remove it") from error
    if task is not None and not mine and own.folder != submitter.folder:
        matches = ((record, _TASK.match(record.attempt)) for record in submitter.history())
        return [record for record, match in matches if match and int(match[1]) == task]
    return mine
