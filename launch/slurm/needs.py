"""Jobs that wait for jobs: a pipeline's stages, by the numbers that their parents have now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch.pipeline.record import StageRecord
from launch.slurm.asking import on_cluster
from launch.slurm.control import ControlError, SilentError, ask, show
from trainer.job.directory import JobDirectory, read_lines


def dependency(record: StageRecord) -> str | None:
    """Return what sbatch is to wait for before a stage: the newest jobs of those it needs; None where all are done."""
    numbers = []
    for folder in record.needs.values():
        job = JobDirectory(Path(folder))
        word = job.last_word()
        number = newest_job(job)
        if number is not None and not (word is not None and word.word == "DONE" and word.code == 0):
            numbers.append(number)
    return f"afterok:{':'.join(numbers)}" if numbers else None


def newest_job(job: JobDirectory) -> str | None:
    """Return the number of the newest submission."""
    submissions = read_lines(job.submissions)
    return str(submissions[-1]["job_id"]) if submissions else None


def newest_cluster(job: JobDirectory) -> str | None:
    """Return the cluster that the newest submission went to; None: the one that was there."""
    submissions = read_lines(job.submissions)
    return (submissions[-1].get("cluster") or None) if submissions else None


def redirect_children(job: JobDirectory) -> Iterator[str]:
    """Let the stages that wait for a job wait for its newest submission; yield a line for each.

    A job that is submitted anew has another number. Before the old one ends, the jobs behind it must no longer wait for
    that: SLURM would cancel them, or start them.
    """
    record = StageRecord.load(job)
    for name, folder in ({} if record is None else record.children).items():
        child = JobDirectory(Path(folder))
        known, number = StageRecord.load(child), newest_job(child)
        if known is None or number is None:
            continue
        try:
            needed = redirect(known, number, newest_cluster(child))
        except (ControlError, SilentError) as error:
            yield f"stage {name} (job {number}) cannot be told to wait for the new job: {error}"
        else:
            yield f"stage {name} (job {number}) now waits for {needed or 'nothing'}"


def redirect(record: StageRecord, number: str, cluster: str | None = None) -> str | None:
    """Let a stage's job wait for the newest jobs of those it needs.

    Raises `ControlError` where it waits no longer, `SilentError`.
    """
    needed = dependency(record)
    if show(number, cluster).get("JobState") != "PENDING":
        raise ControlError(f"job {number} is no longer waiting")
    if needed is not None:
        ask("scontrol", *on_cluster(cluster), "update", f"JobId={number}", f"Dependency={needed}")
    return needed
