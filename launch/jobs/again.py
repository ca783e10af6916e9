"""The command that starts a job again, with the options it was launched with."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.jobs.plan import unique_name
from launch.pipeline.record import StageRecord
from trainer.errors import InputError
from trainer.job.directory import JobDirectory

_OF_THE_FOLDER = ("name", "run")
"""Options that follow from the run's folder where they are not given."""


def command_again(plan: dict[str, Any], directory: JobDirectory) -> str | None:
    """Return what to type to start a job again; None where its plan does not tell.

    Whatever a cluster's profile said is spelled out, so that the command means the same when the profile has changed.
    """
    stage = _stage_of(directory)
    if stage is not None:
        on = " --on slurm" if plan.get("way") == "slurm" else ""
        return f"signscale pipeline {shlex.quote(stage.pipeline)}{on}"
    command = plan.get("command")
    if not command or (plan.get("tasks") and not plan.get("sweep")):
        return None
    words = ["signscale", "launch", str(plan.get("way")), *_options(plan), "--", *map(str, command)]
    return shlex.join(words)


def _stage_of(directory: JobDirectory) -> StageRecord | None:
    try:
        return StageRecord.load(directory)
    except InputError:
        # The pipeline's own commands say so; here it only decides what to type.
        return None


def _options(plan: dict[str, Any]) -> Iterator[str]:
    # Imported here: most reports print no such command.
    from launch.jobs.options import CommonOptions
    from launch.slurm.options import SlurmOptions

    run = Path(str(plan.get("run", "")))
    if plan.get("name") not in (None, run.name, unique_name(run)):
        yield f"--name={plan['name']}"
    if str(plan["command"][0]) == "-m":
        yield f"--run={plan.get('run')}"
    for field in dataclasses.fields(CommonOptions):
        # The plan's name for the default configuration is not what was typed.
        if field.name not in (*_OF_THE_FOLDER, "accelerate_config"):
            yield from _flag(field.name, plan.get(field.name, field.default), field.default)
    if plan.get("way") == "local" and int(plan.get("ranks_per_node") or 1) > 1:
        yield f"--processes={plan['ranks_per_node']}"
    given = dict(plan.get("slurm") or {})
    if plan.get("sweep"):
        # The numbers of those that were left are not those that are left now.
        given["array"] = plan.get("array", "")
        yield from _flag("sweep", plan["sweep"], ())
    for one in dataclasses.fields(SlurmOptions):
        yield from _flag(one.name, given.get(one.name, one.default), one.default)


def _flag(name: str, value: Any, default: Any) -> Iterator[str]:
    if isinstance(default, tuple):
        for item in value or ():
            yield f"--{name}={item}"
    elif isinstance(default, bool):
        if value != default:
            yield f"--{name}" if value else f"--no_{name}"
    elif value not in (None, default):
        # meeting_seconds is a whole number as an option.
        yield f"--{name}={int(value) if isinstance(value, float) else value}"
