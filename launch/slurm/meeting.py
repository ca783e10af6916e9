"""How the nodes of an attempt find one another: through files in RUN/job, before there is a network between them."""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.slurm.environment import ports
from launch.slurm.network import address_towards, interface_of, is_free
from trainer.errors import InputError, name_some
from trainer.files import write_json
from trainer.job.directory import JobDirectory

_PACKAGES = ("signscale", "torch", "accelerate", "deepspeed", "numpy")
_POLL_SECONDS = 0.1


class UnfitError(InputError):
    """The nodes cannot work together, now or in another attempt."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What all nodes of an attempt have agreed on, and this node's own part."""

    address: str
    """Of the head node, as the others reach it."""
    port: int
    token: str
    """What all ranks compare, so that a rank of another job is refused."""
    node: int
    """Number of this node."""
    host: str
    interface: str
    """Network interface that leads to the other nodes."""


def meet(
    job: JobDirectory, attempt: str, *, node: int, nodes: int, seconds: float, unfit: Path | None = None
) -> Meeting:
    """Report this node, and wait until the head node has seen all of them.

    `unfit` is where the batch script notes nodes that cannot even start Python (default: where nodes report). Raises on
    every node: `UnfitError` if one cannot start Python, or runs other versions; `InputError` if one does not come
    within `seconds` or no port is free, which another attempt may not meet with.
    """
    folder = job.folder / f"nodes-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    hosts = list_hosts()
    if len(hosts) != nodes:
        raise InputError(
            f"scontrol names {len(hosts)} nodes ({name_some(hosts)}), the job has {nodes}; look at its log"
        )
    here = {"host": hosts[node], "versions": describe_versions()}
    write_json(folder / f"node-{node}.json", here)
    deadline = time.monotonic() + seconds
    if node == 0:
        agreed = _agree(folder, attempt, hosts, deadline, unfit or folder)
        write_json(folder / "meeting.json", agreed)
    else:
        agreed = _wait_for(folder / "meeting.json", deadline + 10, f"the head node, {hosts[0]},")
    if "refused" in agreed:
        raise (UnfitError if agreed["for_good"] else InputError)(agreed["refused"])
    reached = agreed["address"]
    interface = interface_of(reached if node == 0 else address_towards(reached))
    return Meeting(**agreed, node=node, host=hosts[node], interface=interface)


def list_hosts() -> list[str]:
    """List the nodes of this job by name, in the order of their numbers."""
    known = os.environ.get("SIGNSCALE_HOSTS", "")
    if known:
        return known.split(",")
    failure = ""
    for pause in (0.0, 1.0, 3.0, 10.0):
        time.sleep(pause)
        # The controller may be busy for a moment.
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode == 0 and answer.stdout.split():
            return answer.stdout.split()
        failure = answer.stderr.strip()
    raise InputError(f"{platform.node()}: scontrol cannot name the nodes of this job: {failure}")


def describe_versions() -> dict[str, str | None]:
    """Name the versions that must be the same on all nodes; from metadata alone, nothing is imported."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _agree(folder: Path, attempt: str, hosts: list[str], deadline: float, noted: Path) -> dict[str, Any]:
    """Wait for all nodes, compare them, and choose where the ranks meet; or say why not."""
    reports: dict[int, dict[str, Any]] = {}
    while len(reports) < len(hosts):
        for node in set(range(len(hosts))) - reports.keys():
            if report := _read(folder / f"node-{node}.json"):
                reports[node] = report
        unfit = [path.read_text(encoding="utf-8").strip() for path in noted.glob("unfit.*")]
        if unfit:
            said = f"{name_some(unfit)}; check --interpreter, --venv or --conda, and that all nodes share it"
            return _refusal(said, for_good=True)
        if time.monotonic() > deadline:
            missing = name_some([hosts[node] for node in range(len(hosts)) if node not in reports])
            said = f"{missing} did not come in time; is {folder.parent} seen there? The job's log has its lines"
            return _refusal(said, for_good=False)
        time.sleep(_POLL_SECONDS)
    if problems := compare_versions([reports[node] for node in range(len(hosts))]):
        return _refusal("; ".join(problems), for_good=True)
    address = "127.0.0.1" if len(hosts) == 1 else address_towards(hosts[1])
    port = next((port for port in ports(attempt) if is_free(port)), None)
    if port is None:
        # The next attempt has other ports.
        return _refusal(f"{hosts[0]}: none of the ports of this attempt is free", for_good=False)
    return {"address": address, "port": port, "token": secrets.token_hex(16)}


def _refusal(reason: str, *, for_good: bool) -> dict[str, Any]:
    return {"refused": reason, "for_good": for_good}


def compare_versions(reports: list[dict[str, Any]]) -> list[str]:
    """Say which nodes run other versions than the first."""
    head = reports[0]
    return [
        f"{report['host']} has {name} {version}, {head['host']} has {head['versions'].get(name)}; give all nodes the "
        "same environment"
        for report in reports[1:]
        for name, version in report["versions"].items()
        if version != head["versions"].get(name)
    ]


def _wait_for(path: Path, deadline: float, whom: str) -> dict[str, Any]:
    while not (content := _read(path)):
        if time.monotonic() > deadline:
            raise InputError(f"{socket.gethostname()}: {whom} has not answered; its lines in the job's log say why")
        time.sleep(_POLL_SECONDS)
    return content


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
