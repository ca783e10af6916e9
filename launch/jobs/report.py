"""What is known of a run and its job as one record, which commands print or hand on as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.jobs.again import command_again
from launch.jobs.evidence import Evidence, gather, read_plan, read_submissions, read_tasks
from launch.jobs.judging import ACTIVE, State, Verdict, judge, name_run
from launch.jobs.plain_run import judge_plain
from launch.jobs.queue import Queue, find_parents
from launch.jobs.traces import Progress, read_progress, tail
from launch.jobs.words import say_duration, say_time
from launch.slurm.squeue import QueuedJob
from launch.slurm.states import explain_end, has_ended
from launch.sweep.table import RECORD as SWEEP
from trainer.errors import InputError
from trainer.job.directory import WORDS, AttemptRecord, JobDirectory

RECIPE = "recipe.yaml"
_LOG_LINES = 12


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """One run."""

    run: Path
    name: str
    """Of the job; of the folder where nothing was launched."""
    way: str | None
    """debug, local or slurm; None: never launched."""
    state: State | str
    why: str
    """One line."""
    job: QueuedJob | None = None
    """The job that holds or waits for machines."""
    job_ids: tuple[str, ...] = ()
    """All submissions, oldest first."""
    attempts: tuple[AttemptRecord, ...] = ()
    progress: Progress | None = None
    outlook: str | None = None
    """When it will be done, against the time limit."""
    notes: tuple[str, ...] = ()
    """What else a reader should know: SLURM does not answer, a job's number is another's."""
    log: Path | None = None
    """Log of the newest attempt."""
    last_lines: tuple[str, ...] = ()
    """Of the log, where the run failed or was lost."""
    next: tuple[str, ...] = ()
    tasks: tuple[RunReport, ...] = ()
    """Of an array."""

    @property
    def is_active(self) -> bool:
        """Tell whether the run, or a task of it, holds or waits for machines."""
        return self.state in ACTIVE or any(task.is_active for task in self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return _plain(dataclasses.asdict(self))


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run: it has a job directory, or what training writes."""
    return has_job(folder) or (folder / RECIPE).is_file()


def has_job(folder: Path) -> bool:
    """Tell whether a folder has a job directory: one with a file of ours, or an empty one, just made."""
    directory = JobDirectory.of(folder)
    if not directory.folder.is_dir():
        return False
    ours = (
        *(directory.plan, directory.script, directory.snapshot, directory.submissions, directory.attempts),
        *(directory.owner, directory.cancellation, *(directory.folder / word for word in WORDS)),
    )
    return any(path.exists() for path in ours) or not any(directory.folder.iterdir())


def report_runs(runs: Sequence[Path]) -> tuple[list[RunReport], list[str]]:
    """Report on runs, asking SLURM once for all of them; a run that cannot be read is named among the problems."""
    problems: list[str] = []
    readable: list[tuple[Path, JobDirectory, dict[str, Any] | None, list[dict[str, Any]]]] = []
    for run in runs:
        directory = JobDirectory.of(run)
        try:
            readable.append((run, directory, read_plan(directory), read_submissions(directory)))
        except (InputError, OSError) as error:
            problems += _name_problems(run, error)
    queue = Queue(line for _, _, plan, submissions in readable for line in (*submissions, *_of_tasks(plan, problems)))
    reports = []
    for run, directory, plan, submissions in readable:
        try:
            reports.append(_report(gather(run, directory, plan, submissions, queue, None), queue))
        except (InputError, OSError) as error:
            problems += _name_problems(run, error)
    return reports, problems


def _of_tasks(plan: dict[str, Any] | None, problems: list[str]) -> list[dict[str, Any]]:
    """List what the tasks of an array submitted themselves, where SLURM would not take them back."""
    lines: list[dict[str, Any]] = []
    for task in (plan or {}).get("tasks") or []:
        try:
            lines += read_submissions(JobDirectory.of(Path(task["run"])))
        except InputError as error:
            problems += error.problems
    return lines


def report_run(run: Path) -> RunReport:
    """Report on one run. Raises `InputError` where it is none, or cannot be read."""
    whole, task = name_task(run)
    if task is None:
        check_is_run(run)
    reports, problems = report_runs([whole])
    if problems:
        raise InputError(problems)
    return reports[0] if task is None else reports[0].tasks[task]


def name_task(run: Path, task: int | None = None) -> tuple[Path, int | None]:
    """Return the array that a run is a task of, and its number there; a run of its own as it was given."""
    if task is not None or JobDirectory.of(run).plan.exists():
        return run, task
    tasks = (read_plan(JobDirectory.of(run.absolute().parent)) or {}).get("tasks") or []
    numbers = [number for number, one in enumerate(tasks) if Path(one["run"]).resolve() == run.resolve()]
    return (run.absolute().parent, numbers[0]) if numbers else (run, None)


def check_is_run(run: Path) -> None:
    """Raise `InputError` unless the folder is a run."""
    if not run.is_dir():
        raise InputError(f"{run}: expected the folder of a run, found {'a file' if run.exists() else 'nothing'}")
    if not is_run(run):
        hint = f"; did you mean {run.parent}?" if run.name == "job" and is_run(run.parent) else ""
        if (run / SWEEP).is_file():
            hint = f"; it is a sweep of runs that were started here: `signscale sweep {run}` shows them"
        raise InputError(
            f"{run}: is no run (neither job/ nor {RECIPE} in it){hint or '; `signscale jobs FOLDER` lists those below'}"
        )


def _report(evidence: Evidence, queue: Queue) -> RunReport:
    tasks = [_report_one(task, queue, number) for number, task in enumerate(read_tasks(evidence, queue))]
    if not tasks:
        return _report_one(evidence, queue, None)
    states: dict[str, int] = {}
    for task in tasks:
        states[task.state] = states.get(task.state, 0) + 1
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items(), key=lambda item: -item[1]))
    whole = _report_one(evidence, queue, None)
    return dataclasses.replace(
        whole,
        state=_sum_up([task.state for task in tasks]),
        why=f"{len(tasks)} tasks: {counted}",
        tasks=tuple(_without_restart(tasks, evidence)),
        progress=None,
        outlook=None,
        job=None,
        last_lines=(),
        next=_next_of_array(whole.next, tasks, evidence),
    )


def _next_of_array(whole: Sequence[str], tasks: Sequence[RunReport], evidence: Evidence) -> tuple[str, ...]:
    """List what to type: an array as a whole has no last word, and goes on where one of its tasks is not done."""
    table = (f"signscale sweep {name_run(evidence)}  # the runs, best first",) if _is_sweep(evidence) else ()
    active = [number for number, task in enumerate(tasks) if task.is_active]
    if active or any(task.state == "UNKNOWN" for task in tasks):
        number = next((number for number in active if tasks[number].state == "RUNNING"), active[0] if active else 0)
        watch = f"signscale logs -f {name_run(evidence)} --task {number}  # watch one of them"
        return (watch, *whole, *table)
    again = command_again(evidence.plan or {}, evidence.directory)
    if again is None or all(task.state == "DONE" for task in tasks):
        return table
    return (f"{again}  # start those that are not done, each where it was", *table)


def _without_restart(tasks: Sequence[RunReport], evidence: Evidence) -> Sequence[RunReport]:
    """Name no command that starts one again while any is at work: it starts all that are not done, and is refused."""
    again = command_again(evidence.plan or {}, evidence.directory)
    if again is None or not any(task.is_active for task in tasks):
        return tasks
    return [
        dataclasses.replace(task, next=tuple(one for one in task.next if not one.startswith(again))) for task in tasks
    ]


def _is_sweep(evidence: Evidence) -> bool:
    return bool((evidence.plan or {}).get("sweep"))


def _sum_up(states: Sequence[str]) -> str:
    """Name the state of an array: the liveliest of its tasks', else the worst."""
    order = ("RUNNING", "STOPPING", "REQUEUED", "QUEUED", "HELD", "UNKNOWN", "FAILED", "LOST", "CANCELLED", "STOPPED")
    return next((state for state in (*order, "PREPARED", "PREPARING", "DONE") if state in states), states[0])


def _report_one(e: Evidence, queue: Queue, task: int | None) -> RunReport:
    launched = has_job(e.run) or task is not None
    verdict = judge(e, lambda job: _blame(e, queue)) if launched else judge_plain(e.run, e.now)
    first_step = max((record.step or 0 for record in e.attempts[:-1]), default=0)
    progress = read_progress(e.run, e.newest, e.log, first_step=first_step)
    if verdict.state not in ("RUNNING", "STOPPING"):
        progress = dataclasses.replace(progress, steps_per_second=None)
    notes = [f"job {job.job_id} is not this run's: it runs {job.command}" for job in e.known.strangers]
    if e.known.trouble and verdict.state != "UNKNOWN":
        notes.append(f"{e.known.trouble}; all this is from the run's own files")
    wanted = verdict.state in ("FAILED", "LOST") and e.log is not None
    lines = [line for line in tail(e.log, num_bytes=16384).splitlines() if line.strip()] if wanted and e.log else []
    plan = e.plan or {}
    overrides = " ".join(f"{key}={value}" for key, value in _overrides(plan, task).items())
    name = str(plan.get("name") or e.run.name)
    return RunReport(
        run=e.run,
        name=name if task is None else f"{name} {task} {overrides}".rstrip(),
        way=plan.get("way") if launched else None,
        state=verdict.state,
        why=verdict.why,
        job=verdict.job,
        job_ids=tuple(dict.fromkeys(str(line["job_id"]) for line in e.submissions)),
        attempts=e.attempts,
        progress=progress if progress.step is not None else None,
        outlook=foresee(verdict, progress, e.now),
        notes=tuple(notes),
        log=e.log if e.log and e.log.exists() else None,
        last_lines=tuple(lines[-_LOG_LINES:]),
        next=verdict.next,
    )


def _overrides(plan: dict[str, Any], task: int | None) -> dict[str, Any]:
    settings = {} if task is None else dict(plan["tasks"][task].get("overrides") or {})
    # Where the run lies is known; its recipe lies there.
    return {key: value for key, value in settings.items() if key not in ("config", "output_dir")}


def _blame(e: Evidence, queue: Queue) -> str | None:
    """Name the jobs that the newest submission was to come after, and what became of them."""
    line = e.submissions[-1]
    parts = []
    for job_id in find_parents(line):
        if any(job_id == other["job_id"] for other in e.submissions):
            # Submitted anew by its own earlier job, which it only follows.
            continue
        job = queue.find(job_id, line.get("cluster"))
        if job is None:
            parts.append(f"job {job_id}, which SLURM no longer knows")
            continue
        run = Path(job.command).parent.parent if job.command else None
        whose = f" ({run})" if run is not None else ""
        fate = f"{job.state}, {explain_end(job)}" if has_ended(job) else job.state
        parts.append(f"job {job_id}{whose} {fate}")
    return "; ".join(parts) or None


def foresee(verdict: Verdict, progress: Progress, now: float) -> str | None:
    """Say when a run that works now will be done, and whether the time limit comes first."""
    if verdict.state != "RUNNING" or not progress.total or progress.step is None or not progress.steps_per_second:
        return None
    left = max(0, progress.total - progress.step) / progress.steps_per_second
    done = f"about {say_duration(left)} to go, done at {say_time(now + left, now)}"
    job = verdict.job
    if job is None or job.end is None or job.limit is None:
        return done
    limit = f"the time limit ({say_time(job.end, now)})"
    if now + left <= job.end:
        return f"{done}, before {limit}"
    times = int(-(-(now + left - job.end) // job.limit))
    return f"{done}, after {limit}: it will save, be requeued and go on, {times} more time{'s' if times > 1 else ''}"


def _name_problems(run: Path, error: InputError | OSError) -> list[str]:
    if isinstance(error, InputError):
        return list(error.problems)
    return [f"{error.filename or run}: cannot be read ({error.strerror})"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
