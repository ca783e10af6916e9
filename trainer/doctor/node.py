"""One process per node: looks at the node, meets the others, starts the ranks, and never waits without an end.

What nodes tell each other lies in files of a shared folder, so that the leader (node 0) can speak of nodes that answer
nothing. Imports no torch: a node on which torch does not import must still report.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.doctor.facts import NodeFacts, find_facts
from trainer.doctor.finding import Finding, any_failed, guarded, join_alike, skipped
from trainer.doctor.judging import judge_absent, judge_network
from trainer.doctor.network import Line, Listener, Peer, UnreachableError, own_addresses, rounds
from trainer.doctor.rank_stage import Stage, count_ranks, judge_ranks, run_stage
from trainer.doctor.storage import check_storage
from trainer.doctor.verdicts import check_limits, check_versions
from trainer.files import write_json

FINDINGS = "findings.json"
OPTIONS = "options.json"
_POLL_SECONDS = 0.1
_MEETING_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an examination is asked to do; written to the report folder before any node starts."""

    run: str
    """Run directory, absolute; it need not exist."""
    token: str
    """Known to the nodes of this examination alone."""
    nodes: int = 1
    names: tuple[str, ...] = ()
    """Names of the nodes in their order, where they are known before any of them speaks."""
    ranks_per_node: int = 0
    """0: one per device, one on a CPU."""
    accelerate_config: str = ""
    """Configuration of `accelerate launch`; empty: the shipped one that fits."""
    cpu: bool = False
    """Keep to the CPU."""
    recipe: tuple[str, ...] | None = None
    """Flags of `signscale train`; None: the machines alone are looked at."""
    ranks: bool = True
    """Whether to start ranks, which need torch."""
    hasty: bool = False
    """Start none where nodes failed already."""
    patience: float = 60.0
    """Seconds that nodes wait for each other."""
    limit: float = 600.0
    """Seconds that the ranks may take."""

    def write(self, report: Path) -> None:
        """Write the options where the nodes look for them."""
        write_json(report / OPTIONS, asdict(self))

    @classmethod
    def read(cls, report: Path) -> Options:
        """Read what `write` wrote."""
        stored = json.loads((report / OPTIONS).read_text(encoding="utf-8"))
        names, recipe = tuple(stored["names"]), stored["recipe"]
        return cls(**{**stored, "names": names, "recipe": None if recipe is None else tuple(recipe)})


class Node:
    """This node's part of an examination."""

    def __init__(self, report: Path, options: Options, *, index: int, name: str) -> None:
        self.report, self.options, self.index, self.name = report, options, index, name
        self.leads = index == 0
        self.findings: list[Finding] = []
        self._facts: list[NodeFacts] = []

    def examine(self) -> list[Finding]:
        """Do this node's part; on node 0 write and return all findings, elsewhere return this node's own."""
        with contextlib.closing(Listener(self.index, self.options.token, self.options.nodes)) as listener:
            self._introduce(listener)
            members = self._gather(listener)
            if members is None or self.index not in members:
                # Too late, or unseen by the leader, which says so.
                return self.findings
            lines = self._measure(listener, members)
            self._tell("network", lines)
            if self.leads:
                self._judge_nodes(members)
            stage = self._prepare_stage(listener, members)
        if stage is not None:
            self._tell("ended", run_stage(stage, self.report, self.index))
        if self.leads:
            self._conclude(members, stage)
        return self.findings

    def _introduce(self, listener: Listener) -> None:
        """Look at this node and tell the others."""
        facts: list[NodeFacts] = []
        found = guarded("node", lambda: facts.append(find_facts(self.name, self.index)) or [], node=self.name)  # type: ignore[func-returns-value]
        found += guarded("run directory", lambda: check_storage(Path(self.options.run), self.name), node=self.name)
        self.findings += found
        self._tell(
            "node",
            {
                "node": self.name,
                "hosts": list(dict.fromkeys([socket.gethostname(), *own_addresses()])),
                "port": listener.port,
                "facts": facts[0].to_json() if facts else None,
                "speed": _processor_speed(),
                "findings": [one.to_json() for one in found],
            },
        )

    def _gather(self, listener: Listener) -> dict[int, dict[str, Any]] | None:
        """Wait for the nodes; return what each of those that came says of itself, the same on all of them."""
        told = {index: self.report / f"node-{index}.json" for index in range(self.options.nodes)}
        if self.leads:
            wait_until(lambda: all(path.exists() for path in told.values()), self.options.patience)
            came = [index for index, path in told.items() if path.exists()]
            listener.nodes = len(came)
            self._tell("members", came)
        # Without a shared folder a node sees its own file alone, and waits in vain for the leader's.
        came = self._hear("members", 0, self.options.patience + _MEETING_SECONDS)
        return None if came is None else {index: self._hear("node", index, _MEETING_SECONDS) for index in came}

    def _measure(self, listener: Listener, members: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        """Reach the leader and, round by round, other nodes."""
        found: dict[str, Any] = {"pairs": [], "offset": None, "by_name": True, "findings": []}
        if len(members) == 1:
            return found
        peers = {
            index: Peer(index=index, node=said["node"], hosts=tuple(said["hosts"]), port=said["port"])
            for index, said in members.items()
        }
        leader: Line | None = None
        if not self.leads:
            try:
                leader = Line(peers[0], self.options.token)
                # How far this node is ahead of the leader.
                found["offset"], found["by_name"] = -leader.clock_offset(), leader.by_name
            except (UnreachableError, OSError) as error:
                found["findings"].append(self._unreachable(error).to_json())
                return found
        patience = _MEETING_SECONDS

        def meet(name: str) -> None:
            nonlocal patience
            if leader is not None:
                together = leader.meet(name, self.index, patience)
            else:
                together = listener.meet(name, self.index, patience)
            # Who did not come once is not waited for again.
            patience = patience if together else 0.0

        try:
            for number, pairs in enumerate(rounds(sorted(members))):
                # One measurement on a line at a time: nodes that are early wait.
                meet(f"round {number}")
                for first, second in pairs:
                    if first == self.index:
                        found["pairs"].append([first, second, self._speed(peers[second])])
            # Nobody leaves while another one still measures with it.
            meet("end")
        except OSError as error:
            found["findings"].append(self._unreachable(error).to_json())
        return found

    def _speed(self, peer: Peer) -> float | None:
        try:
            return Line(peer, self.options.token).bandwidth()
        except OSError:
            return None

    def _unreachable(self, error: OSError) -> Finding:
        return Finding(
            check="network",
            value=f"{self.name} does not reach {error}",
            verdict="FAIL",
            mend="exclude the node (--exclude), and tell the administrators; a firewall between nodes must let all "
            "ports through",
            nodes=(self.name,),
        )

    def _prepare_stage(self, listener: Listener, members: Mapping[int, dict[str, Any]]) -> Stage | None:
        """Agree on who starts ranks and where they meet; None where there are none to start."""
        if not self.options.ranks:
            return None
        if self.leads:
            heard = self._await_networks(members)
            able = [index for index in members if index in heard and not heard[index]["findings"]]
            if not able or (self.options.hasty and any_failed(self.findings)):
                self._tell("stage", None)
                return None
            self._tell("stage", asdict(Stage.plan(self.options, able, address=listener.local_address)))
        told = self._hear("stage", 0, 3 * _MEETING_SECONDS)
        if told is None:
            return None
        stage = Stage(**told)
        return stage if self.index in stage.members else None

    def _await_networks(self, members: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        paths = {index: self.report / f"network-{index}.json" for index in members}
        wait_until(lambda: all(path.exists() for path in paths.values()), 3 * _MEETING_SECONDS)
        return {index: json.loads(path.read_text(encoding="utf-8")) for index, path in paths.items() if path.exists()}

    def _judge_nodes(self, members: Mapping[int, dict[str, Any]]) -> None:
        """Judge, on the leader, what the nodes found before any rank is started."""
        options = self.options
        names = {index: str(said["node"]) for index, said in members.items()}
        found = judge_absent(names, options.names, options.nodes, self.report, options.patience)
        found += join_alike([Finding.from_json(one) for said in members.values() for one in said["findings"]])
        self._facts = [NodeFacts.from_json(said["facts"]) for said in members.values() if said["facts"]]
        if self._facts:
            ranks = count_ranks(options)
            found += guarded("versions", lambda: check_versions(self._facts))
            found += guarded("shared memory", lambda: check_limits(self._facts, ranks))
        heard = self._await_networks(members)
        found += guarded("network", lambda: judge_network(members, names, heard))
        self.findings = found

    def _conclude(self, members: Mapping[int, dict[str, Any]], stage: Stage | None) -> None:
        """Add what the ranks found, and write everything."""
        names = {index: str(said["node"]) for index, said in members.items()}
        found = self.findings
        if stage is not None:
            found += judge_ranks(stage, self.report, names)
        elif self.options.ranks:
            found.append(skipped("ranks", "not started: nodes failed before"))
        write_json(
            self.report / FINDINGS,
            {
                "ok": not any_failed(found),
                "nodes": list(names.values()),
                "findings": [one.to_json() for one in found],
                "facts": [one.to_json() for one in self._facts],
            },
        )

    def _tell(self, topic: str, content: Any) -> None:
        index = "" if topic in ("members", "stage") else f"-{self.index}"
        write_json(self.report / f"{topic}{index}.json", content)

    def _hear(self, topic: str, index: int, seconds: float) -> Any:
        suffix = "" if topic in ("members", "stage") else f"-{index}"
        path = self.report / f"{topic}{suffix}.json"
        if not wait_until(path.exists, seconds):
            return None
        return json.loads(path.read_text(encoding="utf-8"))


def _processor_speed() -> float:
    """Return the bytes a second that one core hashes: the best of short tries, which other processes disturb little."""
    import hashlib

    block, best = bytes(1 << 19), 0.0
    for _ in range(40):
        started = time.perf_counter()
        hashlib.sha256(block)
        best = max(best, len(block) / (time.perf_counter() - started))
    return best


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for something that another node does; tell whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return condition()
        time.sleep(_POLL_SECONDS)
    return True


def main(argv: Sequence[str]) -> int:
    """Take part, as `srun` starts this on every node: `python -m trainer.doctor.node REPORT`."""
    report = Path(argv[0])
    index = int(os.environ.get("SLURM_NODEID", "0"))
    Node(report, Options.read(report), index=index, name=own_name()).examine()
    return 0


def own_name() -> str:
    """Name this node as SLURM does, or by its host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
