"""Handing a batch script to sbatch, and saying whose fault it is when sbatch will not have it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.asking import on_cluster
from launch.slurm.environment import clean
from trainer.errors import InputError
from trainer.job.directory import JobDirectory

_NO_CLUSTER = (
    *("Could not establish a configuration source", "Unable to contact slurm controller", "DNS SRV lookup failed"),
    *("Unable to process configuration file", "Unable to establish controller machine"),
)
_BLAME = (
    # What sbatch says, and the option it means.
    ("invalid partition", "--partition"),
    ("job not submitted: partition", "--partition"),
    ("invalid account or account/partition", "--account, or --partition, which the account may not use"),
    ("invalid qos", "--qos"),
    ("invalid feature", "--constraint"),
    ("invalid generic resource", "--gpus_per_node: the nodes have no such GPUs"),
    ("invalid gres", "--gpus_per_node: the nodes have no such GPUs"),
    ("node count specification invalid", "--nodes"),
    ("more processors requested than permitted", "--cpus_per_task x ranks, or --nodes"),
    (
        "requested node configuration is not available",
        "--nodes, --gpus_per_node, --cpus_per_task, --mem or --constraint",
    ),
    ("memory specification can not be satisfied", "--mem"),
    ("invalid node name", "--nodelist or --exclude"),
    ("requested time limit is invalid", "--time"),
    ("invalid time limit", "--time"),
    ("invalid --time", "--time"),
    ("requested reservation is invalid", "--reservation"),
    ("invalid license", "--licenses"),
    ("invalid job array", "--array"),
    ("invalid array", "--array"),
    ("invalid --mail-type", "--mail_type"),
    ("invalid dependency", "a job that is to be waited for"),
    ("job dependency problem", "a job that is to be waited for"),
    ("unrecognized option", "--sbatch"),
    ("no cluster", "--clusters"),
    ("invalid cluster name", "--clusters"),
)


def submit(
    script: Path,
    *,
    job: JobDirectory,
    dependencies: Sequence[str] = (),
    array: str | None = None,
    exclude: Sequence[str] = (),
    cluster: str | None = None,
    hold: bool = False,
    test_only: bool = False,
) -> str:
    """Submit a batch script, record it, and return the job id; with `test_only` return what sbatch would do.

    `dependencies` are sbatch's (`afterok:4711`, `singleton`); the job is cancelled where one can never be met.
    `exclude` names nodes to stay away from, and `cluster` the cluster, in place of those that the script names; `hold`
    keeps the job from starting until it is released. Raises `InputError` with sbatch's own message and the option to
    blame.
    """
    if shutil.which("sbatch") is None:
        raise InputError(f"sbatch is not on PATH: {_elsewhere()}")
    command = ["sbatch", "--parsable", *on_cluster(cluster)]
    if dependencies:
        command += [f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"]
    if array is not None:
        command.append(f"--array={array}")
    if exclude:
        command.append(f"--exclude={','.join(exclude)}")
    if hold:
        command.append("--hold")
    if test_only:
        command.append("--test-only")
    job.logs.mkdir(parents=True, exist_ok=True)
    answer = subprocess.run(
        [*command, str(script)], env=clean(os.environ), capture_output=True, text=True, errors="replace", check=False
    )
    if answer.returncode:
        raise InputError(explain(answer.stderr, script))
    if test_only:
        return answer.stderr.strip()
    match = re.fullmatch(r"(\d+)(?:;(\S+))?", answer.stdout.strip())
    if not match:
        raise InputError(f"sbatch answered {answer.stdout.strip()!r}, expected a job id; look with squeue")
    # Where a script names clusters, sbatch adds which of them took the job.
    job_id, taker = match.groups()
    job.add_submission(job_id, cluster=taker, after=list(dependencies), **({"held": True} if hold else {}))
    return job_id


def foresee(script: Path, *, job: JobDirectory) -> str | None:
    """Say why a job that sbatch takes would never start, as far as the cluster can tell; None where it would.

    Many clusters take every job and let those wait for ever that ask for more than there is. Nodes may also be down
    for a while, so that this is a warning and no refusal.
    """
    try:
        submit(script, job=job, test_only=True)
    except InputError as error:
        return "; ".join(error.problems)
    return None


def require_cluster() -> None:
    """Raise `InputError` where no cluster can be asked, before anything is written."""
    if shutil.which("sbatch") is None:
        raise InputError(f"sbatch is not on PATH: {_elsewhere()}")
    answer = subprocess.run(["sinfo", "--version"], env=clean(os.environ), capture_output=True, text=True, check=False)
    if answer.returncode:
        raise InputError(explain(answer.stderr, Path("job.sh")))


def explain(refusal: str, script: Path) -> str:
    """Turn sbatch's refusal into one message that names the option to blame."""
    if any(text in refusal for text in _NO_CLUSTER):
        return f"no SLURM cluster answers ({_last_line(refusal)}): {_elsewhere()}"
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in refusal.splitlines()]
    said = "; ".join(dict.fromkeys(line for line in lines if line)) or "nothing"
    blamed = next((option for text, option in _BLAME if text in refusal.lower()), None)
    mend = f"look at {blamed}" if blamed else "see the #SBATCH lines"
    return f"sbatch refused the job: {said}; {mend} (the script is {script}; sinfo and scontrol show what there is)"


def _elsewhere() -> str:
    return "submit on a login node of the cluster, or use `signscale launch local` on this machine"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].removeprefix("sbatch: ").strip()
