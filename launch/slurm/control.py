"""What a running job asks of SLURM: how it stands, when its time is over, and to be put back into the queue."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

_PATIENCE = 300.0
"""Seconds for which a controller that does not answer is asked again."""

_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes")


class ControlError(Exception):
    """SLURM refused, or did not answer; the message is its own."""


def ask(*command: str, patience: float = _PATIENCE) -> str:
    """Run one of SLURM's commands; ask again where the controller does not answer. Raises `ControlError`."""
    deadline = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            problem = f"{command[0]} does not answer"
        except OSError as error:
            raise ControlError(f"{command[0]}: {error.strerror}") from error
        else:
            if done.returncode == 0:
                return done.stdout
            problem = (done.stderr or done.stdout).strip()
            if not any(text in problem for text in _UNREACHABLE):
                raise ControlError(problem)
        if time.monotonic() > deadline:
            raise ControlError(problem)
        time.sleep(2.0)


def show(job_id: str) -> dict[str, str]:
    """Return what `scontrol show job` says, by name."""
    # Values with spaces, such as a job's comment, are cut short; none of them is used.
    return dict(re.findall(r"(?:^| )([A-Z][\w:/]*)=(\S*)", ask("scontrol", "--oneliner", "show", "job", job_id)))


def node_names(nodes: str) -> tuple[str, ...]:
    """Write out an abbreviated list of nodes."""
    return tuple(ask("scontrol", "show", "hostnames", nodes).split()) if nodes else ()


def end_time(job_id: str, environment: Mapping[str, str]) -> float | None:
    """Return when the job's time is over, in Unix seconds; None: it has no limit, or nobody knows."""
    if (known := environment.get("SLURM_JOB_END_TIME", "")).isdigit():
        return float(known)
    # SLURM before 23.02 does not export it.
    try:
        return datetime.fromisoformat(ask("squeue", "-h", "-j", job_id, "-o", "%e", patience=20).strip()).timestamp()
    except (ControlError, ValueError):
        return None


def requeue(job_id: str) -> None:
    """Put the running job back into the queue; from now on SLURM ends this very script. Raises `ControlError`."""
    ask("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Keep the job away from more nodes. Raises `ControlError`: only a pending job's can be changed.

    A job is pending from the moment it is requeued; its script lives on for a little (KillWait).
    """
    already = show(job_id).get("ExcNodeList", "(null)")
    names = ",".join([*([] if already == "(null)" else [already]), *nodes])
    ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}", patience=20)
