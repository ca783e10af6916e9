"""Whether somebody works in a run already."""

from __future__ import annotations

import shlex
from pathlib import Path

from launch.jobs.evidence import gather, read_submissions
from launch.jobs.judging import ACTIVE, judge
from launch.jobs.queue import Queue
from trainer.errors import InputError
from trainer.job.directory import JobDirectory


def check_not_live(run: Path) -> None:
    """Raise `InputError` if a job of this run is queued or running."""
    if found := find_live(JobDirectory.of(run)):
        name = shlex.quote(str(run))
        raise InputError(
            f"{run}: a job works on it already, {found}; look with `signscale status {name}`, end it with "
            f"`signscale cancel {name}`, or choose another folder"
        )


def find_live(job: JobDirectory) -> str | None:
    """Say which job works in a run, or waits to; None where none is known to.

    One that nobody can be asked about counts as none: whichever attempt begins last is the run's owner, and no other
    can publish.
    """
    submissions = read_submissions(job)
    verdict = judge(gather(job.folder.parent, job, None, submissions, Queue(submissions), None))
    return f"{verdict.state}: {verdict.why}" if verdict.state in ACTIVE else None
