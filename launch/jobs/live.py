"""Whether somebody works in a run already."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from launch.slurm.environment import clean
from trainer.errors import InputError
from trainer.job.directory import AttemptRecord, JobDirectory, read_lines


def check_not_live(run: Path) -> None:
    """Raise `InputError` if a job of this run is queued or running."""
    if found := find_live(JobDirectory.of(run)):
        raise InputError(
            f"{run}: {found}; look with `signscale status {run}`, end it with `signscale cancel {run}`, "
            "or choose another folder"
        )


def find_live(job: JobDirectory) -> str | None:
    """Say which job works in a run, or waits to; None where none is known to."""
    submissions = read_lines(job.submissions)
    if submissions:
        newest = submissions[-1]
        if state := queue_state(str(newest["job_id"]), newest.get("cluster")):
            return f"SLURM job {newest['job_id']} is {state} for it"
    history = job.history()
    if history and _runs_here(history[-1]):
        return f"process {history[-1].pid} trains it on this machine"
    return None


def queue_state(job_id: str, cluster: str | None) -> str | None:
    """Return the state in which squeue knows a job, in lower case; None for one that is over or cannot be asked for."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"]
    if cluster:
        command += ["--clusters", cluster]
    answer = subprocess.run(command, env=clean(os.environ), capture_output=True, text=True, check=False)
    if answer.returncode:
        return None
    waiting = ("PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "COMPLETING", "STOPPED")
    states = [word for word in answer.stdout.split() if word in waiting]
    return states[0].lower() if states else None


def _runs_here(attempt: AttemptRecord) -> bool:
    if attempt.ended is not None or attempt.pid is None or attempt.host != platform.node():
        return False
    try:
        os.kill(attempt.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
