"""Asking SLURM about jobs: squeue first, scontrol where squeue will not, sacct for what both have forgotten."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.slurm.squeue import (
    SACCT_FORMAT,
    SEPARATOR,
    SQUEUE_FORMAT,
    QueuedJob,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
)
from launch.slurm.states import has_ended

_SECONDS = 30.0
"""A controller that does not answer is given up by squeue itself after 8 to 10 s."""
_IDS_PER_CALL = 200
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")
_STRANGERS = ("SLURM_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SBATCH_")
_UNKNOWN_JOB = "Invalid job id"
_NO_ACCOUNTING = "accounting storage is disabled"
_SILENT = {
    "Could not establish a configuration source": "no cluster is configured on {host}; ask from the login node",
    "Unable to contact slurm controller": "SLURM's controller does not answer",
    "Socket timed out": "SLURM's controller does not answer",
    "Unable to establish controller": "SLURM's controller does not answer",
}


class SlurmSilentError(Exception):
    """SLURM could not be asked; the message says why, in words."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What SLURM knows of the jobs asked for."""

    jobs: tuple[QueuedJob, ...] = ()
    """Those it knows; of an array, each task."""
    trouble: str | None = None
    """Why it could not be asked: what is missing from `jobs` may exist all the same."""


def ask(job_ids: Iterable[str], cluster: str | None = None) -> Answer:
    """Ask for jobs by id, arrays by the id of the whole; ids that SLURM no longer knows are missing from the answer."""
    wanted = sorted(set(job_ids))
    jobs: list[QueuedJob] = []
    trouble: str | None = None
    for first in range(0, len(wanted), _IDS_PER_CALL):
        some = wanted[first : first + _IDS_PER_CALL]
        try:
            jobs += _ask_queue(some, cluster)
        except SlurmSilentError as error:
            trouble = str(error)
            break
    missing = sorted(set(wanted) - {job.base for job in jobs})
    if missing:
        found = _ask_accounting(missing, cluster)
        # What the controller does not know has ended, even where the accounting missed it.
        jobs += [job for job in found if trouble or has_ended(job)]
    if trouble and set(wanted) == {job.base for job in jobs} and all(map(has_ended, jobs)):
        # All ends are on record; there is nothing left to ask the controller.
        trouble = None
    return Answer(jobs=tuple(jobs), trouble=trouble)


def run_tool(tool: str, *arguments: str, seconds: float = _SECONDS) -> str:
    """Run one of SLURM's tools and return what it prints. Raises `SlurmSilentError` with what it says instead."""
    if shutil.which(tool) is None:
        raise SlurmSilentError(f"{tool} is not on the PATH of {platform.node()}; ask from the login node")
    try:
        done = subprocess.run(
            [tool, *arguments],
            env=clean_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmSilentError(f"{tool} did not answer within {seconds:.0f} s") from error
    except OSError as error:
        raise SlurmSilentError(f"{tool} cannot be run ({error.strerror})") from error
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    for sign, words in _SILENT.items():
        if sign in said:
            raise SlurmSilentError(words.format(host=platform.node()))
    raise SlurmSilentError(f"{tool}: {said.splitlines()[-1].removeprefix(f'{tool}: ').removeprefix('error: ')}")


def clean_environment() -> dict[str, str]:
    """Return the environment without what changes the tools' output: SQUEUE_FORMAT, SLURM_TIME_FORMAT, an outer job."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_STRANGERS)}
    return kept | {"LC_ALL": "C"}


def on_cluster(cluster: str | None) -> list[str]:
    """Return the option that names another cluster than the default one."""
    return [f"--clusters={cluster}"] if cluster else []


def _ask_queue(job_ids: Sequence[str], cluster: str | None) -> list[QueuedJob]:
    try:
        wanted = ["--jobs", ",".join(job_ids), *on_cluster(cluster)]
        return parse_squeue(
            run_tool("squeue", "--noheader", "--array", "--all", "--states=all", *wanted, "-o", SQUEUE_FORMAT)
        )
    except SlurmSilentError as error:
        if _UNKNOWN_JOB in str(error):
            return []
        if str(error) in {words.format(host=platform.node()) for words in _SILENT.values()}:
            raise
        # squeue is missing or refuses; scontrol may still answer. If it does not either, squeue's reason is the news.
        jobs: list[QueuedJob] = []
        for job_id in job_ids:
            try:
                jobs += parse_scontrol(run_tool("scontrol", *on_cluster(cluster), "show", "job", job_id))
            except SlurmSilentError as other:
                if _UNKNOWN_JOB not in str(other):
                    raise error from other
        return jobs


def _ask_accounting(job_ids: Sequence[str], cluster: str | None) -> list[QueuedJob]:
    """Ask sacct, where there is accounting; without it there is nothing more to know."""
    form = ["-n", "-P", "-X", f"--delimiter={SEPARATOR}", "-o", SACCT_FORMAT]
    try:
        return parse_sacct(run_tool("sacct", *form, "-j", ",".join(job_ids), *on_cluster(cluster)))
    except SlurmSilentError:
        # No accounting, or its daemon is down: it is the last source, and a report names the first one's trouble.
        return []
