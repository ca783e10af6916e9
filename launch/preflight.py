"""The preflight of a batch job: nodes that fail, hang or are slow, named before the ranks start.

`python -m launch.doctor --preflight --job RUN/job`, started by `srun` once on every node. It always ends, and exits
0: what it found lies in RUN/job/preflight-<attempt>.json, written by node 0. Imports no torch.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.slurm.environment import attempt_name
from launch.slurm.meeting import list_hosts
from trainer.doctor.finding import Finding, shorten
from trainer.doctor.node import FINDINGS, OPTIONS, Node, Options, own_name, wait_until
from trainer.errors import InputError
from trainer.files import write_json
from trainer.job.directory import ATTEMPT, JobDirectory
from trainer.options import OptionParser, positive_number

_SHARED = frozenset(("run directory", "free disk"))
"""Checks whose failure on every node is no node's fault."""


def main(argv: Sequence[str]) -> int:
    """Do this node's part of the preflight; node 0 writes the verdict."""
    asked = _parse(argv)
    job = JobDirectory(asked.job)
    index = int(os.environ.get("SLURM_NODEID", "0"))
    attempt = os.environ.get(ATTEMPT) or attempt_name(os.environ)
    if index:
        _take_part(asked, job, index, attempt)
        return 0
    verdict: dict[str, Any]
    try:
        verdict = _lead(asked, job, attempt)
    except Exception as error:
        # The director waits for a verdict, whatever happens.
        name = own_name()
        said = "; ".join(error.problems) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        verdict = {"ok": False, "bad_nodes": [], "problems": [f"{name}: the preflight broke: {shorten(said)}"]}
    write_json(verdict_path(job, attempt), verdict)
    for problem in verdict["problems"]:
        print(f"preflight: {problem}", file=sys.stderr)
    return 0


def verdict_path(job: JobDirectory, attempt: str) -> Path:
    """Return where the verdict on an attempt's nodes lies."""
    return job.folder / f"preflight-{attempt}.json"


def judge(findings: Sequence[Finding], nodes: Sequence[str]) -> dict[str, Any]:
    """Turn findings into a verdict: a failure that all nodes share excludes none of them, it is no node's fault."""
    failures = [one for one in findings if one.verdict == "FAIL"]
    at_fault: dict[str, set[str]] = {}
    for one in failures:
        at_fault.setdefault(one.check, set()).update(one.nodes)
    bad: set[str] = set()
    for check, faulty in at_fault.items():
        if faulty != set(nodes) or (len(nodes) == 1 and check not in _SHARED):
            bad |= faulty
    return {
        "ok": not failures,
        "bad_nodes": sorted(bad),
        "problems": [f"{one.check}: {one.value}" + (f"; {one.mend}" if one.mend else "") for one in failures],
    }


def _lead(asked: Namespace, job: JobDirectory, attempt: str) -> dict[str, Any]:
    plan = json.loads(job.plan.read_text(encoding="utf-8"))
    names = tuple(list_hosts())
    options = Options(
        run=plan["run"],
        token=secrets.token_hex(16),
        nodes=len(names),
        names=names,
        ranks_per_node=plan["ranks_per_node"],
        accelerate_config=str(Path(plan["accelerate_config"]).absolute()) if plan.get("accelerate_config") else "",
        cpu=bool(plan.get("use_cpu", False)),
        # A command without torch has no devices to look at.
        ranks=plan.get("launcher", "accelerate") == "accelerate",
        # The job goes back into the queue without the bad nodes, and comes here again.
        hasty=True,
        patience=asked.patience,
        limit=asked.limit,
    )
    report = _report_folder(job, attempt)
    report.mkdir(parents=True, exist_ok=True)
    options.write(report)
    Node(report, options, index=0, name=own_name()).examine()
    found = json.loads((report / FINDINGS).read_text(encoding="utf-8"))
    findings = [Finding.from_json(one) for one in found["findings"]]
    absent = {node for one in findings for node in one.nodes} - set(found["nodes"])
    return judge(findings, [*found["nodes"], *absent])


def _take_part(asked: Namespace, job: JobDirectory, index: int, attempt: str) -> None:
    report = _report_folder(job, attempt)
    if not wait_until((report / OPTIONS).exists, asked.patience):
        print(f"preflight: {socket.gethostname()} sees no {report / OPTIONS}", file=sys.stderr)
        return
    Node(report, Options.read(report), index=index, name=own_name()).examine()
    # srun ends the others a while after the first that leaves.
    wait_until((report / FINDINGS).exists, asked.limit + asked.patience)


def _report_folder(job: JobDirectory, attempt: str) -> Path:
    # A director that asks twice in one attempt starts another step.
    return job.folder / f"preflight-{attempt}" / f"step-{os.environ.get('SLURM_STEP_ID', '0')}"


def _parse(argv: Sequence[str]) -> Namespace:
    parser = OptionParser(prog="python -m launch.doctor --preflight", description=__doc__)
    parser.add_argument("--job", type=Path, required=True, metavar="RUN/job", help="job directory")
    parser.add_argument("--patience", type=positive_number, default=45.0, help="seconds nodes wait for each other")
    parser.add_argument("--limit", type=positive_number, default=180.0, help="seconds the ranks may take")
    return parser.parse(argv)
