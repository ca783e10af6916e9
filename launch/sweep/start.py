"""Starting a sweep: its runs one after the other here, or as one job array."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.options import LaunchOptions
from launch.jobs.plan import Plan, Task, Way
from launch.prepare import RECIPE, describe, missing_paths, prepare, write
from launch.sweep.axes import SweepTask, make_tasks, parse_axes
from launch.sweep.table import format_table, publish, read_rows, record
from trainer.errors import InputError
from trainer.files import write_text
from trainer.job.directory import JobDirectory


def launch_sweep(way: Way, options: LaunchOptions, command: Sequence[str]) -> int:
    """Check every combination, then start those that are not done; return 1 where one is not done at the end.

    Raises `InputError` with what is wrong in any of them.
    """
    if way == "debug" or list(command[:1]) != ["train"]:
        raise InputError("--sweep: sweeps a training, here or on a cluster: signscale launch local|slurm … -- train …")
    tasks = make_tasks(command[1:], parse_axes(options.sweep))
    plans = _plan_tasks(way, options, command, tasks)
    done = [task for task in tasks if _is_done(task)]
    out = tasks[0].run.parent
    print(f"sweep of {len(tasks)} runs in {out}, {len(done)} of them done")
    todo = [number for number, task in enumerate(tasks) if task not in done]
    if way == "slurm":
        return _submit(options, command, tasks, plans, todo)
    if options.dry_run or not todo:
        print("\n\n".join(f"{tasks[number].label}\n{describe(plans[number], options)}" for number in todo))
        return 0
    return _run(out, tasks, plans, todo)


def _plan_tasks(way: Way, options: LaunchOptions, command: Sequence[str], tasks: Sequence[SweepTask]) -> list[Plan]:
    """Plan each run as if it were launched alone; a problem that many share is told once."""
    plans: list[Plan] = []
    problems: dict[str, str] = {}
    for task in tasks:
        try:
            plans.append(prepare(way, _alone(options), [*command, *task.words]))
        except InputError as error:
            for problem in error.problems:
                problems.setdefault(problem, f"{task.label}: {problem}")
    if problems:
        raise InputError(problems.values())
    return plans


def _alone(options: LaunchOptions) -> LaunchOptions:
    return dataclasses.replace(options, slurm=dataclasses.replace(options.slurm, array=""))


def _is_done(task: SweepTask) -> bool:
    word = JobDirectory.of(task.run).last_word()
    return word is not None and word.word == "DONE"


def _run(out: Path, tasks: Sequence[SweepTask], plans: Sequence[Plan], todo: Sequence[int]) -> int:
    # Here, since it takes what a batch job needs none of.
    from launch import local

    record(out, [(task.run, task.settings) for task in tasks])
    for place, number in enumerate(todo, 1):
        print(f"\nrun {place} of {len(todo)}: {tasks[number].label}", flush=True)
        local.run(write(plans[number]))
        try:
            publish(out)
        except (InputError, OSError) as error:
            # No failure of a run; the table comes with the next one, or with `signscale sweep`.
            print(f"warning: no table of the sweep: {error}", file=sys.stderr)
        word = plans[number].job.last_word()
        if plans[number].job.stop.exists() or (word is not None and word.word == "RESUME"):
            print("\nstopped; the same command goes on here", file=sys.stderr)
            break
    rows = read_rows(out)
    print(f"\n{format_table(rows)}")
    return 0 if all(_is_done(task) for task in tasks) else 1


def _submit(
    options: LaunchOptions,
    command: Sequence[str],
    tasks: Sequence[SweepTask],
    plans: Sequence[Plan],
    todo: Sequence[int],
) -> int:
    from launch.slurm.script import render
    from launch.slurm.submit import require_cluster, submit

    array = _array(options.slurm.array, len(tasks), todo)
    slurm = dataclasses.replace(options.slurm, array=array)
    # A run's own recipe comes last and says everything; the settings beside it are for those who read the plan.
    members = [
        Task(run=plan.run, overrides={**task.settings, "config": str(plan.job.folder / RECIPE)})
        for task, plan in zip(tasks, plans, strict=True)
    ]
    whole = dataclasses.replace(
        prepare("slurm", dataclasses.replace(options, slurm=slurm), command, tasks=members),
        sweep=options.sweep,
        array=options.slurm.array,
    )
    print(describe(whole, options))
    for number in todo:
        print(f"  {number:>5}  {tasks[number].label}")
    if not todo:
        print("nothing to do: every run is done")
        return 0
    for path in missing_paths(whole):
        print(f"warning: {path} is not there on this machine; the job needs it on the nodes", file=sys.stderr)
    if options.dry_run:
        print(f"\n{render(whole)}", end="")
        return 0
    require_cluster()
    whole = write(whole)
    for plan in plans:
        _write_recipe(plan)
    record(whole.run, [(task.run, task.settings) for task in tasks])
    job_id = submit(whole.job.script, job=whole.job)
    print(f"\nqueued as job array {job_id}; next:")
    for line in (f"sweep {whole.run}  # the table of results", f"status {whole.run}", f"cancel {whole.run}"):
        print(f"  signscale {line}")
    return 0


def _write_recipe(plan: Plan) -> None:
    from trainer.parsing import dump_recipe
    from trainer.recipe import Recipe

    assert plan.recipe is not None
    plan.job.folder.mkdir(parents=True, exist_ok=True)
    write_text(plan.job.folder / RECIPE, dump_recipe(Recipe.from_flat(dict(plan.recipe))))


def _array(asked: str, count: int, todo: Sequence[int]) -> str:
    """Name the tasks to start as sbatch does: those asked for, or all that are not done."""
    numbers, percent, at_once = asked.partition("%")
    if not numbers:
        return ",".join(map(str, todo)) + percent + at_once
    largest = max(int(number) for number in re.findall(r"\d+", numbers.partition(":")[0]))
    if largest >= count:
        raise InputError(f"--array {asked}: the sweep has {count} runs, 0 to {count - 1}")
    return asked
