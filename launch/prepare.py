"""From a command and options to one plan, and to the files that a job is started from."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.jobs.live import check_not_live
from launch.jobs.options import LaunchOptions
from launch.jobs.place import understand
from launch.jobs.plan import MULTI_NODE, Plan, Task, Way, unique_name
from launch.jobs.snapshot import describe_code, list_files, list_keys, take_snapshot
from launch.slurm.options import has_control_characters
from launch.slurm.paths import settle_paths
from trainer.errors import InputError, name_some
from trainer.files import write_text
from trainer.shipped import SHIPPED

RECIPE = "recipe.yaml"
"""In RUN/job: the recipe as it was resolved at the launch, which is what the ranks read."""


def prepare(way: Way, options: LaunchOptions, command: Sequence[str], *, tasks: Sequence[Task] | None = None) -> Plan:
    """Resolve everything and check it; nothing is written.

    `tasks` makes it a job array. Raises `InputError` with what is wrong in the command, the options or the run's
    folder, or if a job works in it already.
    """
    run = options.common.run
    understood = understand(command, run=Path(run) if run else None)
    if way == "debug":
        from launch.debug import tame

        understood = tame(understood, options.debug)
    _check_folder(understood.run)
    check_not_live(understood.run)
    recipe = understood.recipe
    if recipe is not None and way != "debug":
        recipe = _imply_resume(recipe)
    arguments = understood.arguments
    if recipe is not None:
        arguments = ("--config", str(understood.run / "job" / RECIPE))
    common = options.common
    name = common.name or (unique_name(understood.run) if way == "slurm" else understood.run.name)
    if bad := has_control_characters(name):
        raise InputError(f"--name {name!r}: holds {bad}; leave it out")
    plan = Plan(
        way=way,
        name=name,
        run=understood.run,
        command=understood.words,
        module=understood.module,
        arguments=arguments,
        interpreter=sys.executable,
        launcher=common.launcher,
        code=describe_code(),
        max_attempts_without_progress=common.max_attempts_without_progress,
        meeting_seconds=float(common.meeting_seconds),
        created=time.time(),
        tasks=tuple(tasks) if tasks is not None else None,
        recipe=recipe,
    )
    return _resolve(plan, options)


def write(plan: Plan) -> Plan:
    """Write plan.json, and what the job starts from: the recipe, and for a batch job the code and the script."""
    job = plan.job
    _check_folder(plan.run)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        for one in (job, *(plan.job_of(task) for task in range(len(plan.tasks or ())))):
            one.withdraw_cancellation()
        if plan.recipe is not None:
            from trainer.parsing import dump_recipe
            from trainer.recipe import Recipe

            write_text(job.folder / RECIPE, dump_recipe(Recipe.from_flat(dict(plan.recipe))))
        if plan.snapshot is not None:
            plan = dataclasses.replace(plan, code=take_snapshot(plan.snapshot))
            if left := list_keys():
                _say_once(
                    f"warning: not in the job's copy of the code: {name_some([str(path) for path in left], limit=5)}, "
                    "untracked and by name a key; hand keys to the job by --export, or track the file with git"
                )
        if plan.way == "slurm":
            from launch.slurm.script import render

            write_text(job.script, render(plan))
            job.script.chmod(0o755)
            job.logs.mkdir(exist_ok=True)
        plan.save()
    except OSError as error:
        raise InputError(f"{error.filename or job.folder}: cannot be written ({error.strerror})") from error
    return plan


def describe(plan: Plan, options: LaunchOptions) -> str:
    """Lay the plan out as one table."""
    ranks = (
        f"{plan.world_size} rank(s): {plan.nodes} node(s) x {plan.ranks_per_node}, {plan.cpus_per_rank} core(s) each"
    )
    code = "no git repository" if plan.code.commit is None else plan.code.commit[:12]
    rows = [
        ("way", plan.way),
        ("name", plan.name),
        ("command", shlex.join(plan.command)),
        ("run", str(plan.run)),
        ("job", str(plan.job.folder)),
        ("ranks", ranks),
        ("devices", "CPUs" if plan.use_cpu else "the first GPU, or the CPU" if plan.way == "debug" else "GPUs"),
        ("launcher", "in this process" if plan.accelerate_config is None else plan.launcher),
        ("accelerate", str(plan.accelerate_config)),
        ("interpreter", plan.interpreter),
        ("code", code + (", changed since" if plan.code.changed else "") + (" (a copy)" if plan.snapshot else "")),
    ]
    if plan.way == "debug":
        rows = [row for row in rows if row[0] not in ("launcher", "accelerate")]
    if plan.tasks is not None:
        rows.append(("tasks", str(len(plan.tasks))))
    if plan.slurm is not None:
        rows.append(("profile", options.profile or "none"))
        rows += [(key, _show(value)) for key, value in plan.slurm.items() if value not in ("", (), [], 0, False)]
        rows.append(
            ("given up after", f"{plan.max_attempts_without_progress} attempts in a row without a new step saved")
        )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _resolve(plan: Plan, options: LaunchOptions) -> Plan:
    """Settle how many ranks there are, and what starts them."""
    if plan.way == "slurm":
        return _resolve_slurm(plan, options)
    if plan.way == "debug":
        return dataclasses.replace(plan, accelerate_config=None, cpus_per_rank=_cores(1))
    from launch.local import choose_devices

    ranks, use_cpu, config = choose_devices(options.local, options.common.accelerate_config)
    return dataclasses.replace(
        plan, ranks_per_node=ranks, use_cpu=use_cpu, accelerate_config=config, cpus_per_rank=_cores(ranks)
    )


def _resolve_slurm(plan: Plan, options: LaunchOptions) -> Plan:
    slurm = settle_paths(options.slurm)
    if slurm.array and plan.tasks is None:
        raise InputError(
            "--array: the jobs of an array would write into one run; use --sweep, which gives each its own"
        )
    config = MULTI_NODE
    if options.common.accelerate_config:
        # A name or path of this machine; the copy of the code has it too where it is part of the code.
        found = find_accelerate_config(options.common.accelerate_config)
        config = str(found.relative_to(SHIPPED)) if found.is_relative_to(SHIPPED) else str(found)
    elif not (SHIPPED / MULTI_NODE).exists():
        raise InputError(f"{SHIPPED / MULTI_NODE}: is missing; name a configuration with --accelerate_config PATH")
    interpreter = slurm.interpreter or (f"{slurm.venv}/bin/python" if slurm.venv else plan.interpreter)
    if "\\" in str(plan.run):
        raise InputError(f"{plan.run}: sbatch reads a backslash in the name of its output file as its own; rename it")
    if slurm.container and set(",:") & set(str(plan.run)):
        raise InputError(f"{plan.run}: is to be seen in the container, where , and : part folders; choose another name")
    # A copy that would be too large is better known of now.
    list_files()
    return dataclasses.replace(
        plan,
        nodes=slurm.nodes,
        ranks_per_node=slurm.ranks,
        cpus_per_rank=slurm.cpus_per_rank,
        use_cpu=not slurm.gpu_count,
        accelerate_config=config,
        interpreter=interpreter,
        snapshot=plan.job.snapshot,
        slurm=dataclasses.asdict(slurm),
    )


def find_accelerate_config(name: str) -> Path:
    """Find a configuration of accelerate by name or path."""
    folder = SHIPPED / "accelerate_configs"
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise InputError(f"--accelerate_config {name}: there is no such file; expected a path, or one of {known}")


def _imply_resume(recipe: dict[str, Any]) -> dict[str, Any]:
    """Let a command that was launched before go on: the same recipe in the same folder is the same run."""
    from trainer.parsing import load_recipe
    from trainer.recipe import Recipe
    from trainer.run_directory import check_same_recipe

    stored = Path(recipe["output_dir"]) / "recipe.yaml"
    if not stored.exists():
        return recipe
    check_same_recipe(load_recipe(stored), Recipe.from_flat(recipe), str(stored))
    return recipe | {"resume": recipe["resume"] or "auto"}


def missing_paths(plan: Plan) -> list[str]:
    """List what the recipe reads and this machine does not see; compute nodes may."""
    recipe = plan.recipe or {}
    given = (recipe.get(key) for key in ("data_dir", "teacher", "soft_targets", "init_from"))
    return [str(path) for path in given if path and "://" not in str(path) and not Path(str(path)).exists()]


@functools.cache
def _say_once(text: str) -> None:
    """Say a line, which concerns all jobs of a sweep or a pipeline alike, a single time."""
    print(text, file=sys.stderr)


def _check_folder(run: Path) -> None:
    """Find out before anything else whether the run's folder can be written to."""
    nearest = next(path for path in (run / "job", *(run / "job").parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest}: is a file; choose another folder for the run")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{nearest}: cannot be written to; choose another folder for the run")
    if bad := has_control_characters(str(run)):
        raise InputError(f"{str(run)!r}: holds {bad}; choose another folder for the run")


def _cores(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)
