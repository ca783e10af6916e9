"""SLURM's answers about the jobs of runs: asked once for all of them, and never believed of a stranger's job."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.slurm.asking import Answer, ask
from launch.slurm.squeue import QueuedJob
from trainer.job.directory import JobDirectory

_CLOCK_SLACK = 120.0
"""Seconds by which the clocks of the login node and of SLURM's controller may differ."""


@dataclass(frozen=True, kw_only=True)
class JobsOfRun:
    """What SLURM says of the jobs that a run recorded as its own."""

    jobs: tuple[QueuedJob, ...] = ()
    """Oldest submission first."""
    strangers: tuple[QueuedJob, ...] = ()
    """Jobs under a recorded number that run something else: numbers begin anew when a cluster is set up again."""
    trouble: str | None = None
    """Why SLURM could not be asked."""


class Queue:
    """What SLURM knows of all jobs in a report."""

    def __init__(self, submissions: Iterable[dict[str, Any]]) -> None:
        """Ask for all submissions at once, cluster by cluster."""
        wanted: dict[str | None, set[str]] = {}
        for line in submissions:
            wanted.setdefault(line.get("cluster"), set()).add(str(line["job_id"]))
            wanted[line.get("cluster")].update(find_parents(line))
        self._answers: dict[str | None, Answer] = {
            cluster: ask(ids, cluster) for cluster, ids in sorted(wanted.items(), key=lambda item: item[0] or "")
        }

    def jobs_of(
        self, directory: JobDirectory, submissions: Sequence[dict[str, Any]], task: int | None = None
    ) -> JobsOfRun:
        """Pick the jobs of one run, or of one task of its array."""
        jobs: list[QueuedJob] = []
        strangers: list[QueuedJob] = []
        trouble: str | None = None
        for line in submissions:
            answer = self._answers.get(line.get("cluster"), Answer())
            trouble = trouble or answer.trouble
            for job in answer.jobs:
                if job.base == str(line["job_id"]) and (task is None or job.task == task):
                    (jobs if _is_own(job, directory, line) else strangers).append(job)
        return JobsOfRun(jobs=tuple(jobs), strangers=tuple(strangers), trouble=trouble)

    def find(self, job_id: str, cluster: str | None) -> QueuedJob | None:
        """Return a job by number, whosever it is."""
        answer = self._answers.get(cluster, Answer())
        return next((job for job in answer.jobs if job.base == job_id), None)


def find_parents(submission: dict[str, Any]) -> list[str]:
    """List the numbers of the jobs that a submission comes after; its dependencies are sbatch's (afterok:17:18_3)."""
    return [number for one in submission.get("after") or () for number in re.findall(r"(\d+)(?:_\d+)?", str(one))]


def _is_own(job: QueuedJob, directory: JobDirectory, submission: dict[str, Any]) -> bool:
    if job.command is not None:
        return os.path.realpath(job.command) == os.path.realpath(directory.script)
    # The accounting does not tell the script; a job of that number from before the submission is another one.
    return job.submitted is None or job.submitted >= float(submission["time"]) - _CLOCK_SLACK
