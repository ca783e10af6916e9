"""What a running job asks of SLURM: how it stands, and to be put back into the queue.

About itself it asks its own cluster, without naming it: `--clusters` needs the accounting daemon, which a job that is
to be put back must not depend on.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence

from launch.slurm.asking import on_cluster

_PATIENCE = 900.0
"""Seconds for which a controller that does not answer is asked again: it may be starting anew."""
_BRIEFLY = 30.0
"""The same for what must not come late: after a longer silence the job may be another node's."""

_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes")


class ControlError(Exception):
    """SLURM refused; the message is its own."""


class SilentError(Exception):
    """SLURM did not answer for so long that nobody knows how the job stands."""


def ask(*command: str, patience: float = _PATIENCE) -> str:
    """Run one of SLURM's commands; ask again where nobody answers. Raises `ControlError`, `SilentError`."""
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
            problem = (done.stderr or done.stdout).strip() or f"{command[0]} ended with {done.returncode}"
            if not any(text in problem for text in _UNREACHABLE):
                raise ControlError(problem)
        if time.monotonic() > deadline:
            raise SilentError(problem)
        time.sleep(2.0)


def show(job_id: str, cluster: str | None = None) -> dict[str, str]:
    """Return what `scontrol show job` says, by name; `cluster`: another one than this machine's.

    Raises `ControlError`, `SilentError`.
    """
    said = ask("scontrol", *on_cluster(cluster), "--oneliner", "show", "job", job_id)
    # Values with spaces, such as a job's comment, are cut short; none of them is used.
    return dict(re.findall(r"(?:^| )([A-Z][\w:/]*)=(\S*)", said))


def node_names(nodes: str) -> tuple[str, ...]:
    """Write out an abbreviated list of nodes."""
    return tuple(ask("scontrol", "show", "hostnames", nodes).split()) if nodes else ()


def requeue(job_id: str) -> None:
    """Put the running job back into the queue; from now on SLURM ends this very script.

    Raises `ControlError`, `SilentError`.
    """
    ask("scontrol", "requeue", job_id, patience=_BRIEFLY)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Keep the job away from more nodes. Raises `ControlError`, `SilentError`.

    Only a pending job's nodes can be changed. A job is pending from the moment it is requeued, and its script lives on
    for a little (KillWait).
    """
    names = ",".join(with_excluded(show(job_id), nodes))
    ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}", patience=_BRIEFLY)


def with_excluded(state: Mapping[str, str], nodes: Sequence[str]) -> tuple[str, ...]:
    """Return `nodes` behind those that a job stays away from already, as `show` told; SLURM knows only whole lists."""
    already = state.get("ExcNodeList", "(null)")
    return (*([] if already in ("", "(null)") else [already]), *nodes)
