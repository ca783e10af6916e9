"""From what nodes told each other, or did not, to findings; on the leader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.doctor.finding import Finding
from trainer.doctor.verdicts import check_clocks, check_lines, check_speeds
from trainer.errors import name_some


def judge_absent(
    names: Mapping[int, str], expected: Sequence[str], nodes: int, report: Path, patience: float
) -> list[Finding]:
    """Name the nodes of a job that did not come; `expected`: their names, where they are known."""
    absent = [index for index in range(nodes) if index not in names]
    if not absent:
        return [Finding(check="nodes", value=f"{len(names)}: {name_some(list(names.values()), limit=5)}")]
    missing = [expected[index] if index < len(expected) else f"node {index}" for index in absent]
    return [
        Finding(
            check="nodes",
            value=f"{name_some(missing)} left nothing in {report} within {patience:.0f} s: hung, not "
            "started, or without that folder",
            verdict="FAIL",
            mend="put the run directory where all nodes see it (--output_dir), or exclude the node (--exclude)",
            nodes=tuple(missing),
        )
    ]


def judge_network(
    members: Mapping[int, dict[str, Any]], names: Mapping[int, str], heard: Mapping[int, dict[str, Any]]
) -> list[Finding]:
    """Judge lines, names, clocks and processors by what the members measured (`heard`, if there are several)."""
    found = [Finding.from_json(one) for said in heard.values() for one in said["findings"]]
    pairs = [(names[a], names[b], speed) for said in heard.values() for a, b, speed in said["pairs"]]
    lost = {one.nodes[0] for one in found}
    # That such a node is out of reach for the others too goes without saying.
    pairs = [pair for pair in pairs if not lost & set(pair[:2])]
    if pairs or len(members) == 1:
        found += check_lines(pairs, leader=names[0])
    silent = tuple(names[index] for index in members if index not in heard)
    if silent:
        found.append(
            Finding(
                check="network",
                value=f"{name_some(silent)} did not finish measuring",
                verdict="FAIL",
                mend="exclude the node (--exclude), and tell the administrators",
                nodes=silent,
            )
        )
    unnamed = [names[index] for index, said in heard.items() if not said["by_name"]]
    host = members[0]["hosts"][0]
    found.append(
        Finding(
            check="name resolution",
            value=f"{name_some(unnamed)}: {host} does not lead to {names[0]}, its address does",
            verdict="FAIL",
            mend=f"let the name {host} resolve on all nodes to an address of the network between them",
            nodes=tuple(unnamed),
        )
        if unnamed
        else Finding(check="name resolution", value=f"{host} leads to {names[0]}")
    )
    offsets = {names[index]: said["offset"] for index, said in heard.items() if said["offset"] is not None}
    found += check_clocks(offsets)
    found.append(
        check_speeds(
            "processor",
            {names[index]: float(said["speed"]) for index, said in members.items()},
            show=lambda speed: f"{speed / 1e6:.0f} MB/s hashed",
            mend="exclude the node (--exclude): something else runs there, or it is throttled",
        )
    )
    return found
