"""From what the nodes found to findings: who differs, who is slow, who is out of reach. Pure functions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trainer.doctor.facts import NodeFacts
from trainer.doctor.finding import Finding, size
from trainer.errors import name_some

SLOW = 0.5
"""Share of the median below which a node is slow."""
_SHARED_MEMORY, _SHARED_MEMORY_WANTED = 16 << 20, 64 << 20
_OPEN_FILES, _OPEN_FILES_WANTED = 256, 1024
_SKEW, _SKEW_WANTED = 30.0, 1.0
_POOR = 0.2
"""Share of the median below which a line excludes its node, however quick it is by itself."""
_LINE_WANTED = 125e6
"""Bytes a second between nodes below which a step of a 30 M parameter model waits a second for its gradients."""


def check_same(check: str, values: Mapping[str, Any], *, mend: str, show: Callable[[Any], str] = str) -> Finding:
    """Compare a fact over nodes (or ranks); those that differ from most of them are at fault.

    Where no value has more nodes than any other, none is known to be at fault: the finding fails and names no node.
    """
    shown = {node: show(value) for node, value in values.items()}
    counted = Counter(shown.values())
    if len(counted) <= 1:
        return Finding(check=check, value=f"{next(iter(shown.values()), '-')}{_on(len(shown))}")
    (usual, most), (_, second), *_ = counted.most_common()
    groups: dict[str, list[str]] = {}
    for node, text in shown.items():
        groups.setdefault(text, []).append(node)
    value = "; ".join(f"{text} on {name_some(nodes, limit=5)}" for text, nodes in groups.items())
    odd = tuple(node for node, text in shown.items() if text != usual) if most > second else ()
    return Finding(check=check, value=value, verdict="FAIL", mend=mend, nodes=odd)


def check_versions(facts: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Compare software over the nodes."""
    mend = "let all nodes use one environment: install it where all of them see it, or the same one on each"
    packages = dict.fromkeys(name for one in facts for name in one.versions)
    found = [check_same("python", {one.node: one.python for one in facts}, mend=mend)]
    found += [
        check_same(name, {one.node: one.versions.get(name) or "not installed" for one in facts}, mend=mend)
        for name in packages
    ]
    odd = [one for one in found if one.verdict != "ok"]
    yield from odd
    if not odd:
        versions = {"python": facts[0].python} | facts[0].versions
        named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        yield Finding(check="versions", value=f"{named}{_on(len(facts))}")
    yield check_same(
        "code",
        {one.node: one.code for one in facts},
        mend="run the same checkout on all nodes: put it where all of them see it (signscale launch makes a snapshot)",
    )
    drivers = {one.node: one.driver for one in facts}
    yield check_same(
        "driver",
        drivers,
        mend="ask for nodes of one kind (--constraint), or have the administrators bring the drivers to one version",
        show=lambda driver: driver or "none (CPU)",
    )


def check_limits(facts: Sequence[NodeFacts], ranks_per_node: int) -> Iterator[Finding]:
    """Look at shared memory and open files on each node."""
    least = _SHARED_MEMORY * ranks_per_node
    short = {one.node: one.shared_memory for one in facts if (one.shared_memory or 0) < least}
    small = {one.node: one.shared_memory for one in facts if (one.shared_memory or 0) < _SHARED_MEMORY_WANTED}
    free = min(facts, key=lambda one: one.shared_memory or 0)
    if short or small:
        named = "; ".join(f"{node}: {size(free or 0)} free" for node, free in list((short or small).items())[:5])
        yield Finding(
            check="shared memory",
            value=f"/dev/shm: {named}, {size(least)} are needed for {ranks_per_node} rank(s)",
            verdict="FAIL" if short else "warn",
            mend="remove stale files there, or enlarge it (mount -o remount,size=1G /dev/shm; docker --shm-size=1g)",
            nodes=tuple(short),
        )
    else:
        yield Finding(check="shared memory", value=f"/dev/shm: {size(free.shared_memory or 0)} free{_on(len(facts))}")
    fewest = min(facts, key=lambda one: one.open_files)
    bad = tuple(one.node for one in facts if one.open_files < _OPEN_FILES)
    tight = fewest.open_files < _OPEN_FILES_WANTED
    yield Finding(
        check="open files",
        value=f"{fewest.open_files} a process" + (f" on {fewest.node}" if len(facts) > 1 else ""),
        verdict="FAIL" if bad else "warn" if tight else "ok",
        mend="raise the limit: ulimit -n 4096 before the command" if tight else "",
        nodes=bad,
    )


def check_clocks(offsets: Mapping[str, float]) -> Iterator[Finding]:
    """Compare clocks with the leader's; `offsets`: seconds that each other node is ahead."""
    if not offsets:
        yield Finding(check="clocks", value="one node")
        return
    worst = max(offsets, key=lambda node: abs(offsets[node]))
    skew = abs(offsets[worst])
    yield Finding(
        check="clocks",
        value=f"{skew:.3f} s apart at most ({worst})",
        verdict="FAIL" if skew > _SKEW else "warn" if skew > _SKEW_WANTED else "ok",
        mend="let the node's clock be set (chrony, ntp)" if skew > _SKEW_WANTED else "",
        nodes=tuple(node for node, offset in offsets.items() if abs(offset) > _SKEW),
    )


def check_speeds(check: str, speeds: Mapping[str, float], *, show: Callable[[float], str], mend: str) -> Finding:
    """Compare how quick nodes are with the median of all of them."""
    if not speeds:
        return Finding(check=check, value="nothing measured", verdict="skipped")
    # Of two nodes the quicker one: half of their mean no node would be below.
    usual = statistics.median_high(speeds.values())
    slow = {node: speed for node, speed in speeds.items() if speed < SLOW * usual}
    lowest, highest = min(speeds.values()), max(speeds.values())
    if not slow:
        spread = show(usual) if len(speeds) == 1 else f"{show(lowest)} to {show(highest)}{_on(len(speeds))}"
        return Finding(check=check, value=spread)
    named = ", ".join(f"{node} {show(speed)}" for node, speed in list(slow.items())[:5])
    return Finding(
        check=check,
        value=f"{named}; the median is {show(usual)}",
        verdict="FAIL",
        mend=mend,
        nodes=tuple(slow),
    )


def check_lines(pairs: Sequence[tuple[str, str, float | None]], leader: str) -> Iterator[Finding]:
    """Judge the lines between nodes; a pair's speed is in bytes a second, None where one does not reach the other.

    A node is as quick as its best line: a slow neighbour does not make it slow.
    """
    check = "network"
    if not pairs:
        yield Finding(check=check, value="one node")
        return
    best: dict[str, float] = {}
    for first, second, speed in pairs:
        for node in (first, second):
            best[node] = max(best.get(node, 0.0), speed or 0.0)
    lost = {node for node, speed in best.items() if not speed}
    if lost == set(best):
        # Nobody reaches anybody: the leader's node has to be kept, since the job is there.
        lost.discard(leader)
    for first, second, speed in pairs:
        if speed is None:
            fault = tuple(node for node in (first, second) if node in lost)
            yield Finding(
                check=check,
                value=f"{first} and {second} do not reach each other",
                verdict="FAIL",
                mend="exclude one of the nodes (--exclude), and tell the administrators; a firewall between nodes must "
                "let all ports through",
                nodes=fault or (second if first == leader else first,),
            )
    reached = {node: speed for node, speed in best.items() if speed}
    if not reached:
        return
    found = check_speeds(
        check,
        reached,
        show=lambda speed: f"{size(speed)}/s",
        mend="exclude the node (--exclude), and tell the administrators; --fabric_gbit of `signscale plan` says what "
        "it costs",
    )
    usual = statistics.median_high(reached.values())
    poor = {node for node in found.nodes if reached[node] < max(_LINE_WANTED, _POOR * usual)}
    if found.verdict == "FAIL":
        # A line that is quick enough and shared with others for a moment is no reason to lose a node.
        found = replace(found, verdict="FAIL" if poor else "warn", nodes=tuple(sorted(poor)))
    if found.verdict == "ok" and min(reached.values()) < _LINE_WANTED:
        found = Finding(
            check=check,
            value=f"{found.value} by TCP",
            verdict="warn",
            mend="every step waits for its gradients: see `signscale plan --fabric_gbit`, and use a faster network "
            "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)",
        )
    yield found


def _on(nodes: int) -> str:
    return f" on all {nodes} nodes" if nodes > 1 else ""
