"""`signscale doctor --on slurm`: the examination as a batch job on the nodes that were asked for, waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from launch.jobs.evidence import read_submissions
from launch.jobs.judging import find_live
from launch.jobs.options import CommonOptions, LaunchOptions
from launch.jobs.plan import Plan
from launch.jobs.queue import Queue
from launch.prepare import prepare, write
from launch.slurm.asking import SlurmSilentError, on_cluster, run_tool
from launch.slurm.environment import clean
from launch.slurm.needs import newest_cluster
from launch.slurm.options import SlurmOptions
from trainer.doctor.finding import Finding, shorten
from trainer.doctor.node import FINDINGS, Options
from trainer.errors import InputError
from trainer.job.directory import JobDirectory

_POLL_SECONDS = 0.5
_ASK_SECONDS = 5.0
"""Between two questions to the scheduler."""
_AFTER_SECONDS = 15.0
"""How long after a job's end its last files may take to be seen here."""
_SILENT_SECONDS = 600.0
"""How long the scheduler may not answer: longer than a restart of it takes."""


def examine_on_slurm(folder: Path, asked: Options, slurm: SlurmOptions) -> dict[str, Any]:
    """Submit the examination, wait for its end, and return what it found.

    `folder` takes the job's files and the report, and must lie where all nodes see it. Raises `InputError` for what
    sbatch refuses. Interrupted, it cancels the job.
    """
    from launch.slurm.submit import require_cluster, submit

    require_cluster()
    plan = _plan(folder, slurm)
    report = folder / "report"
    report.mkdir(parents=True)
    dataclasses.replace(
        asked, nodes=slurm.nodes, ranks_per_node=slurm.ranks, cpu=asked.cpu or not slurm.gpu_count
    ).write(report)
    try:
        plan = write(plan)
        job_id = submit(plan.job.script, job=plan.job)
    except InputError:
        # Nothing was started: nothing is left.
        shutil.rmtree(folder)
        raise
    say(f"queued as job {job_id} on {slurm.nodes} node(s), waiting for it; its output: {plan.job.logs}")
    with _cancelling(job_id, newest_cluster(plan.job)):
        given_up = _wait(plan.job, report / FINDINGS)
    if given_up is not None:
        value = _give_up(plan.job, given_up)
        found = [Finding(check="job", value=value, verdict="FAIL", mend=f"read {plan.job.logs}")]
        return {"ok": False, "nodes": [], "findings": [one.to_json() for one in found], "facts": []}
    return dict(json.loads((report / FINDINGS).read_text(encoding="utf-8")))


def say(text: str) -> None:
    """Tell people what happens, beside the table or the document."""
    print(f"signscale doctor: {text}", file=sys.stderr, flush=True)


def _plan(folder: Path, slurm: SlurmOptions) -> Plan:
    """Plan a job of one process a node, which starts the ranks itself: a node that fails must not end the others."""
    whole = dataclasses.replace(
        slurm,
        ranks_per_node=1,
        cpus_per_task=slurm.ranks * slurm.cpus_per_rank,
        requeue=False,
        preflight=False,
    )
    common = CommonOptions(
        name=f"doctor-{folder.name}", run=str(folder), launcher="plain", max_attempts_without_progress=1
    )
    command = ("-m", "trainer.doctor.node", str(folder / "report"))
    return prepare("slurm", LaunchOptions(common=common, slurm=whole), command)


def _wait(job: JobDirectory, findings: Path) -> str | None:
    """Wait for the findings or for the job's end; say why where it is given up, None where there are findings.

    A scheduler that does not answer is no job that has ended: it is asked again, for minutes.
    """
    asked = float("-inf")
    ended: float | None = None
    silent: float | None = None
    while not findings.exists():
        now = time.monotonic()
        if ended is not None and now - ended > _AFTER_SECONDS:
            return "ended without findings"
        if ended is None and now - asked > _ASK_SECONDS:
            asked = now
            is_over, trouble = _ask(job)
            if is_over:
                ended = now
            if trouble is None:
                silent = None
            elif silent is None:
                silent = now
                say(f"{trouble}; waiting on")
            elif now - silent > _SILENT_SECONDS:
                return f"cannot be asked about: {trouble}, for {_SILENT_SECONDS:.0f} s"
        time.sleep(_POLL_SECONDS)
    return None


def _ask(job: JobDirectory) -> tuple[bool, str | None]:
    """Tell whether the job is known to be gone, and why that cannot be told."""
    submissions = read_submissions(job)
    known = Queue(submissions).jobs_of(job, submissions)
    return known.trouble is None and find_live(known.jobs) is None, known.trouble


def _give_up(job: JobDirectory, why: str) -> str:
    """Cancel the job, which may wait or run all the same; say what is known of it."""
    newest = read_submissions(job)[-1]
    job_id = newest["job_id"]
    command = ["scancel", *on_cluster(newest.get("cluster")), job_id]
    try:
        run_tool(*command)
        left = ""
    except SlurmSilentError as error:
        # One that is gone is meant to be: SLURM has forgotten its number.
        gone = "Invalid job id" in str(error)
        left = "" if gone else f"; it may still be queued ({error}): {shlex.join(command)}"
    word = job.last_word()
    if word is not None:
        return shorten(f"job {job_id} left {word.word} and no findings: {word.reason}{left}")
    logs = sorted(job.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    lines = [line for line in logs[-1].read_text(errors="replace").splitlines() if line.strip()] if logs else []
    return shorten(f"job {job_id} {why}: {lines[-1] if lines else 'it said nothing'}{left}")


@contextlib.contextmanager
def _cancelling(job_id: str, cluster: str | None) -> Iterator[None]:
    """Cancel the job where whoever waits for it is told to stop."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        say(f"cancelling job {job_id}")
        subprocess.run(["scancel", *on_cluster(cluster), job_id], env=clean(os.environ), check=False)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
