"""The attempt that a batch script leads: which one it is, what it has saved and said, and what came before it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from launch.jobs.plan import Plan
from launch.jobs.traces import read_saved_step
from launch.slurm.decision import ENDED_BY_SLURM
from launch.slurm.environment import attempt_name, job_name, task_number
from trainer.errors import InputError
from trainer.job.directory import AttemptRecord, Cancellation, JobDirectory, LastWord


@dataclass(frozen=True, kw_only=True)
class Leading:
    """Which attempt at what this process leads."""

    plan: Plan
    job: JobDirectory
    """Of an array, the task's own."""
    job_id: str
    """As squeue and scontrol name it: an array's task is 4711_3."""
    task: int | None
    """Number of the array's task; None: the job is none."""
    restarts: int
    """How often SLURM put the job back into the queue."""
    attempt: str
    nodes: str
    """As SLURM abbreviates them."""

    @property
    def log(self) -> Path:
        """Everything that the attempt says."""
        return self.job.logs / f"{self.attempt}.log"

    def cancelled(self) -> Cancellation | None:
        """Tell whether the job, or the array that it is part of, is not to go on."""
        return self.plan.cancellation_of(self.task)

    def earlier(self) -> list[AttemptRecord]:
        """List the attempts before this one, oldest first; those of former launches have had their chances."""
        return [one for one in self._others() if one.began >= self.plan.created]

    def step_at_launch(self) -> int | None:
        """Return the newest step that was saved before the job was launched (again); None: none was."""
        return max((one.step or 0 for one in self._others() if one.began < self.plan.created), default=None)

    def _others(self) -> list[AttemptRecord]:
        return [record for record in self.job.history() if record.attempt != self.attempt]

    def saved_step(self) -> int | None:
        """Return how far what is saved goes: the step of the newest checkpoint, or what the last word tells of.

        An extraction keeps no checkpoints; its words count the shards that are done. None: nothing is saved.
        """
        saved = read_saved_step(self.job.folder.parent)
        word = self.job.last_word()
        return saved if saved is not None or word is None else word.step

    def word(self) -> LastWord | None:
        """Return the last word of this attempt, if it has left one."""
        word = self.job.last_word()
        return word if word is not None and word.attempt == self.attempt else None


def find(folder: Path) -> Leading:
    """Find out, in RUN/job and the batch script's environment. Raises `InputError` where this node sees no plan."""
    job = JobDirectory(folder.absolute())
    if not job.plan.exists():
        where = f"{socket.gethostname()} does not see {job.plan}"
        raise InputError(f"{where}; the run directory must lie on a file system that all nodes share")
    plan, task = Plan.load(job.plan), task_number(os.environ)
    return Leading(
        plan=plan,
        job=job if plan.tasks is None else plan.job_of(task),
        job_id=job_name(os.environ),
        task=task,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        attempt=attempt_name(os.environ),
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
    )


def close_predecessors(leading: Leading) -> LastWord | None:
    """Record the end of attempts that could not; return the last word of one that ended the whole job."""
    word, saved = leading.job.last_word(), leading.saved_step()
    over = None
    for record in leading.job.history():
        if record.ended is not None or record.attempt == leading.attempt:
            continue
        if word is not None and word.attempt == record.attempt:
            leading.job.end(record.attempt, step=saved, word=word.word, reason=word.reason)
            if word.word != "RESUME" and record.job_id == leading.job_id:
                # SLURM took the job back between the last word and the end of its script.
                over = word
        else:
            leading.job.end(record.attempt, step=saved, word=None, reason=ENDED_BY_SLURM)
    return over
