"""The ranks of an examination: started on each node as training starts them, bounded in time, and judged by files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.doctor.facts import count_devices
from trainer.doctor.finding import Finding, shorten
from trainer.doctor.network import free_port, interface_of
from trainer.errors import name_some
from trainer.shipped import SHIPPED

if TYPE_CHECKING:
    from trainer.doctor.node import Options

RANKS = "ranks.json"
_ABORT = "abort"
_GRACE_SECONDS = 20.0
"""After one node's ranks failed, how long the others' may still finish and speak."""
_TAIL = 4000
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "PET_", "TORCHELASTIC_", "SIGNSCALE_")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Who starts ranks, and where they meet; written by the leader."""

    members: list[int]
    ranks_per_node: int
    config: str
    cpu: bool
    address: str | None
    """The leader's, as another node reached it; None: there is no other."""
    port: int
    limit: float
    recipe: list[str] | None
    interpreter: str

    @classmethod
    def plan(cls, options: Options, members: list[int], *, address: str | None) -> Stage:
        """Decide as `signscale launch` would: a rank per device, or as many as were asked for."""
        ranks, cpu = count_ranks(options), options.cpu or not count_devices()
        several = len(members) > 1
        name = "multi_node" if several else "multi_cpu" if cpu else "multi_gpu" if ranks > 1 else "single_gpu"
        return cls(
            members=members,
            ranks_per_node=ranks,
            config=options.accelerate_config or str(SHIPPED / "accelerate_configs" / f"{name}.yaml"),
            cpu=cpu,
            address=address,
            port=free_port(),
            limit=options.limit,
            recipe=None if options.recipe is None else list(options.recipe),
            interpreter=sys.executable,
        )

    @property
    def world_size(self) -> int:
        """Count the ranks."""
        return len(self.members) * self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """Return the number of the node that a rank runs on."""
        return self.members[rank // self.ranks_per_node]

    def command(self, report: Path, index: int) -> list[str]:
        """Return the command that starts the ranks of a node."""
        module = ["trainer.doctor.ranks", str(report), *(self.recipe or [])]
        if self.world_size == 1:
            return [self.interpreter, "-m", *module]
        words = [self.interpreter, "-m", "accelerate.commands.launch", "--config_file", self.config]
        words += ["--num_processes", str(self.world_size)]
        if len(self.members) > 1:
            words += [
                *("--num_machines", str(len(self.members)), "--machine_rank", str(self.members.index(index))),
                *("--main_process_ip", str(self.address), "--main_process_port", str(self.port)),
                *("--deepspeed_multinode_launcher", "standard"),
            ]
        return [*words, "-m", *module]

    def environment(self, index: int) -> dict[str, str]:
        """Return the environment of that command."""
        # The node's process may be a rank of something else, and of a job whose ranks these are not.
        found = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        if self.cpu:
            found["ACCELERATE_USE_CPU"] = "true"
        if len(self.members) > 1 and self.address:
            interface = interface_of(self.address if index == 0 else _route_to(self.address))
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ():
                found.setdefault(variable, str(interface))
        return found


def count_ranks(options: Options) -> int:
    """Count the ranks of a node: as many as were asked for, else one per device, one on a CPU."""
    return options.ranks_per_node or max(1, 0 if options.cpu else count_devices())


def run_stage(stage: Stage, report: Path, index: int) -> dict[str, Any]:
    """Run this node's ranks to their end, or to the limit; return how they ended."""
    with _ending_on_sigterm():
        return _run(stage, report, index)


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind this process, so that the ranks it started go first."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(stage: Stage, report: Path, index: int) -> dict[str, Any]:
    log = report / f"ranks-of-node-{index}.log"
    abort = report / _ABORT
    deadline, reason = time.monotonic() + stage.limit, ""
    with log.open("wb") as out:
        process = subprocess.Popen(
            stage.command(report, index),
            env=stage.environment(index),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if abort.exists() and not reason:
                    reason = abort.read_text(encoding="utf-8")
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                if time.monotonic() > deadline:
                    reason = reason or f"not done within {stage.limit:.0f} s"
                    break
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    if code and not reason:
        # The others would wait for these ranks until the limit.
        abort.write_text(f"the ranks of node {index} failed", encoding="utf-8")
    return {"code": code, "reason": reason, "tail": log.read_bytes()[-_TAIL:].decode(errors="replace")}


def judge_ranks(stage: Stage, report: Path, names: Mapping[int, str]) -> list[Finding]:
    """Return what the ranks found; where they did not come to an end, how far each of them came."""
    path = report / RANKS
    told: dict[str, Any] = {"done": False, "findings": []}
    if path.exists():
        told = json.loads(path.read_text(encoding="utf-8"))
    found = [Finding.from_json(one) for one in told["findings"]]
    if not told["done"]:
        return [*found, _judge_broken(stage, report, names)]
    if all(one.check != "ranks" for one in found):
        found.insert(0, Finding(check="ranks", value=f"{stage.world_size} on {len(stage.members)} node(s)"))
    return found


def _judge_broken(stage: Stage, report: Path, names: Mapping[int, str]) -> Finding:
    """Say how far each rank came, and whose fault it is that not all came to the end."""
    phases = {rank: _phase(report, rank) for rank in range(stage.world_size)}
    ended = {index: _ended(report, index) for index in stage.members}
    # Ranks that came less far than others are those that the others waited for.
    order = list(dict.fromkeys(phase["phase"] for phase in phases.values() if phase))
    least = min((phase["number"] if phase else -1) for phase in phases.values())
    behind = [rank for rank, phase in phases.items() if (phase["number"] if phase else -1) == least]
    culprits = {stage.node_of(rank) for rank in behind}
    failed = {index for index, how in ended.items() if how and how["code"] > 0 and not how["reason"]}
    culprits = failed or culprits
    if culprits == set(stage.members):
        culprits = set()
    at = (phases[behind[0]] or {}).get("phase", "starting")
    reasons = [f"{names[index]}: {how['reason'] or _last_line(how['tail'])}" for index, how in ended.items() if how]
    silent = [names[index] for index, how in ended.items() if how is None]
    value = f"rank {name_some([str(rank) for rank in behind], limit=5)} of {stage.world_size} ended or hung while {at}"
    if silent:
        reasons.append(f"{name_some(silent)}: no word")
    return Finding(
        check="ranks",
        value=shorten(f"{value} ({'; '.join(reasons)}); phases met: {', '.join(order) or 'none'}"),
        verdict="FAIL",
        mend=f"read {report}/ranks-of-node-*.log; exclude the node (--exclude) if it is one alone",
        nodes=tuple(names[index] for index in sorted(culprits)),
    )


def _phase(report: Path, rank: int) -> dict[str, Any] | None:
    path = report / f"rank-{rank}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _ended(report: Path, index: int) -> dict[str, Any] | None:
    deadline = time.monotonic() + _GRACE_SECONDS + 10.0
    path = report / f"ended-{index}.json"
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("error")]
    return shorten((errors or lines or ["said nothing"])[-1])


def _route_to(host: str) -> str:
    """Return the address from which packets go to a host."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
