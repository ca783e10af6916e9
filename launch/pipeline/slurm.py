"""A pipeline as batch jobs that wait for each other: all of them in the queue, or none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from launch.jobs.evidence import read_plan
from launch.jobs.live import find_live
from launch.jobs.plan import Plan
from launch.pipeline.deciding import Decision
from launch.pipeline.definition import Definition
from launch.pipeline.planning import make_records
from launch.pipeline.record import StageRecord
from launch.pipeline.resolving import Ready, changes
from launch.prepare import missing_paths, write
from launch.slurm.asking import on_cluster
from launch.slurm.control import ControlError, SilentError, ask, show
from launch.slurm.environment import clean
from launch.slurm.needs import newest_cluster, redirect
from launch.slurm.submit import foresee, require_cluster, submit
from trainer.errors import InputError, name_some
from trainer.files import write_text
from trainer.job.directory import JobDirectory, read_lines

_KEPT = ("plan.json", "job.sh", "stage.json", "recipe.yaml", "submissions.jsonl", "CANCELLED", "DONE")
"""Files of a job folder that a submission writes or deletes."""


def find_queued(stages: Sequence[Ready]) -> dict[str, str]:
    """Return the number of the job, by stage, of those that are in the queue already or at work."""
    found: dict[str, str] = {}
    for ready in stages:
        submissions = read_lines(ready.job.submissions)
        if submissions and find_live(ready.job):
            found[ready.name] = str(submissions[-1]["job_id"])
    return found


def check_clusters(stages: Sequence[Ready], plans: Mapping[str, Plan], queued: Mapping[str, str]) -> None:
    """Raise `InputError` for each stage whose job would wait for a job that may be on another cluster.

    SLURM knows such dependencies within a federation alone, and nobody here could try them.
    """
    options = {name: plan.slurm for name, plan in plans.items()}
    options |= {ready.name: (read_plan(ready.job) or {}).get("slurm") for ready in stages if ready.name in queued}
    named = {name: str((given or {}).get("clusters") or "") for name, given in options.items()}
    problems = []
    for ready in stages:
        for other in ready.stage.after:
            # One of the two is submitted now; a job in the queue is told to wait for what is submitted anew. A stage
            # that is in neither is done: nothing waits for it.
            if not ({ready.name, other} <= named.keys() and {ready.name, other} & plans.keys()):
                continue
            mine, theirs = named[ready.name], named[other]
            if mine != theirs or mine == "all" or "," in mine:
                problems.append(
                    f"stage {ready.name} waits for stage {other}, and a job waits for jobs of its own cluster alone: "
                    f"--clusters is {mine or 'not given'} for it and {theirs or 'not given'} for {other}; name one and "
                    "the same cluster for both"
                )
    if problems:
        raise InputError(problems)


def submit_pipeline(
    definition: Definition, decisions: Sequence[Decision], plans: Mapping[str, Plan], queued: Mapping[str, str]
) -> int:
    """Submit the stages that are planned, each to start when those it needs are done.

    Raises `InputError` if one is refused; then none is in the queue that was not there before.
    """
    require_cluster()
    stages = [decision.ready for decision in decisions]
    records = make_records(definition, stages)
    _check_queued(stages, records, queued)
    jobs: dict[str, str] = {}
    doubts: list[str] = []
    held = [ready for ready in stages if (number := queued.get(ready.name)) and _is_held_by_us(ready.job, number)]
    todo = [ready for ready in stages if ready.name in plans]
    with _Undo([plans[ready.name].job for ready in todo]) as undo:
        for ready in todo:
            plan = write(plans[ready.name])
            records[ready.name].save(plan.job)
            # What is to be done again is not done from here on, whatever becomes of the job.
            (plan.job.folder / "DONE").unlink(missing_ok=True)
            # As for a single job no refusal: nodes may be down or taken for a while. What sbatch will not have, it
            # refuses below, and then none is left.
            if trouble := foresee(plan.job.script, job=plan.job):
                doubts.append(f"stage {ready.name} may never start: {trouble}")
        for ready in todo:
            needs = [jobs.get(name) or queued.get(name) for name in ready.stage.after]
            # Nothing starts before all are in the queue; those behind a held job need not be held.
            first = not any(name in jobs for name in ready.stage.after)
            number = _submit(ready, plans[ready.name], needs=[one for one in needs if one is not None], hold=first)
            undo.submitted.append((number, newest_cluster(ready.job)))
            jobs[ready.name] = number
            held += [ready] if first else []
        for ready in stages:
            if ready.name in queued and jobs.keys() & records[ready.name].needs.keys():
                _redirect(ready, records[ready.name], queued[ready.name])
        for ready in held:
            _release(jobs.get(ready.name) or queued[ready.name], newest_cluster(ready.job))
    print(f"\n{_report(decisions, jobs, queued)}")
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    for path in dict.fromkeys(path for plan in plans.values() for path in missing_paths(plan)):
        if not any(path == str(output) for output in _outputs(stages)):
            print(f"warning: {path} is not there on this machine; the jobs need it on the nodes", file=sys.stderr)
    return 0


def _submit(ready: Ready, plan: Plan, *, needs: Sequence[str], hold: bool) -> str:
    try:
        return submit(
            plan.job.script,
            job=plan.job,
            dependencies=[f"afterok:{':'.join(needs)}"] if needs else [],
            hold=hold,
        )
    except InputError as error:
        raise InputError(f"stage {ready.name}: {problem}" for problem in error.problems) from error


def _check_queued(stages: Sequence[Ready], records: Mapping[str, StageRecord], queued: Mapping[str, str]) -> None:
    """Refuse to leave a job in the queue that does something else than the file says now."""
    problems = []
    for ready in stages:
        known = StageRecord.load(ready.job) if ready.name in queued else None
        if known is not None and (known.fingerprint, known.needs) != (
            records[ready.name].fingerprint,
            records[ready.name].needs,
        ):
            changed = changes(known.content, ready.content) or ["the stages it needs"]
            problems.append(
                f"stage {ready.name}: job {queued[ready.name]} was submitted by another definition "
                f"({name_some(changed, 3)}); let it end, or end it: signscale cancel {ready.folder}"
            )
    if problems:
        raise InputError(problems)


def _is_held_by_us(job: JobDirectory, number: str) -> bool:
    """Tell whether a job still waits for a submission that was broken off before it released it."""
    newest = read_lines(job.submissions)[-1]
    if not newest.get("held"):
        return False
    try:
        return "JobHeldUser" in show(number, newest_cluster(job)).get("Reason", "")
    except (ControlError, SilentError) as error:
        raise InputError(f"scontrol show job {number}: {error}; type the same command again") from error


def _redirect(ready: Ready, record: StageRecord, number: str) -> None:
    """Let a job that was in the queue before wait for a stage that is submitted again."""
    try:
        redirect(record, number, newest_cluster(ready.job))
    except (ControlError, SilentError) as error:
        raise InputError(f"stage {ready.name}: {error}; type the same command again") from error


def _release(number: str, cluster: str | None) -> None:
    try:
        ask("scontrol", *on_cluster(cluster), "release", number)
    except (ControlError, SilentError) as error:
        if isinstance(error, ControlError) and "JobHeldUser" not in show(number, cluster).get("Reason", ""):
            # Of a job that asks for more than there is now, scontrol says so and releases it all the same.
            return
        raise InputError(f"scontrol release {number}: {error}; ask who runs the cluster why jobs stay held") from error


def _outputs(stages: Sequence[Ready]) -> list[Path]:
    return [ready.output.absolute() for ready in stages if ready.output is not None]


def _report(decisions: Sequence[Decision], jobs: Mapping[str, str], queued: Mapping[str, str]) -> str:
    rows = [("stage", "job", "starts after", "run")]
    for decision in decisions:
        ready = decision.ready
        number = jobs.get(ready.name) or (f"{queued[ready.name]} (was there)" if ready.name in queued else "done")
        waits = [name for name in ready.stage.after if name in jobs or name in queued] if number != "done" else []
        rows.append((ready.name, number, ", ".join(waits) or "-", str(ready.folder)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    folder = next(decision.ready.folder for decision in decisions if decision.ready.name in {**jobs, **queued})
    return "\n".join([*lines, "", "next:", f"  signscale status {folder}", f"  signscale logs -f {folder}"])


class _Undo:
    """Takes a submission back that did not come to its end: jobs out of the queue, files as they were."""

    def __init__(self, jobs: Sequence[JobDirectory]) -> None:
        self.submitted: list[tuple[str, str | None]] = []
        """Number and cluster of each job."""
        self._jobs = jobs
        self._files: dict[Path, bytes | None] = {}

    def __enter__(self) -> _Undo:
        for job in self._jobs:
            for name in _KEPT:
                path = job.folder / name
                self._files[path] = path.read_bytes() if path.is_file() else None
            if job.snapshot.is_dir():
                _aside(job).parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(_aside(job), ignore_errors=True)
                job.snapshot.rename(_aside(job))
        self._missing = {folder for job in self._jobs for folder in _missing_folders(job.folder)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            for job in self._jobs:
                shutil.rmtree(_aside(job), ignore_errors=True)
            return
        remaining = self._cancel()
        self._restore()
        problems = error.problems if isinstance(error, InputError) else ("interrupted",)
        if isinstance(error, InputError | KeyboardInterrupt):
            said = f"; {remaining}" if remaining else ""
            raise InputError([*problems, f"no stage was left in the queue, and no file changed{said}"]) from error

    def _cancel(self) -> str:
        failures = []
        for cluster in dict.fromkeys(cluster for _, cluster in self.submitted):
            command = [
                "scancel",
                *on_cluster(cluster),
                *(number for number, where in self.submitted if where == cluster),
            ]
            done = subprocess.run(command, env=clean(os.environ), capture_output=True, text=True, check=False)
            if done.returncode:
                failures.append(f"but {' '.join(command)} failed: {done.stderr.strip()}")
        return "; ".join(failures)

    def _restore(self) -> None:
        for job in self._jobs:
            if _aside(job).is_dir():
                shutil.rmtree(job.snapshot, ignore_errors=True)
                _aside(job).rename(job.snapshot)
        for path, content in self._files.items():
            if content is not None:
                write_text(path, content.decode())
            else:
                path.unlink(missing_ok=True)
        own = {job.folder for job in self._jobs}
        for folder in sorted(self._missing, key=lambda path: -len(path.parts)):
            if folder in own:
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _aside(job: JobDirectory) -> Path:
    return job.folder / ".snapshot-before"


def _missing_folders(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.parents) if not path.exists()]
