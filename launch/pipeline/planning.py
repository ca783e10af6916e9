"""From a stage to the plan of a job: its launch options, and what its ranks run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from launch.jobs.live import check_not_live
from launch.jobs.options import LaunchOptions, parse_options
from launch.jobs.plan import Plan, Way
from launch.pipeline.definition import Definition
from launch.pipeline.record import StageRecord
from launch.pipeline.resolving import Ready, absolute_words
from launch.prepare import prepare
from launch.slurm.options import FIELDS
from trainer.errors import InputError

_OWN = ("name", "run", "launcher", "dry_run", "sweep", "array")
"""Options of a launch that a pipeline sets itself."""


def plan_stages(
    definition: Definition, stages: Sequence[Ready], way: Way, extra: Sequence[str]
) -> dict[str, tuple[Plan, LaunchOptions]]:
    """Plan each stage; `extra` are launch options of the command line. Raises `InputError` with all problems."""
    problems: dict[str, None] = {}
    found: dict[str, tuple[Plan, LaunchOptions]] = {}
    for ready in stages:
        where = f"{definition.file}:{ready.stage.line}: stage {ready.name}"
        try:
            found[ready.name] = _plan(definition, ready, way, extra)
        except InputError as error:
            problems |= dict.fromkeys(f"{where}: {problem}" for problem in error.problems)
    if problems:
        raise InputError(problems)
    return found


def _plan(definition: Definition, ready: Ready, way: Way, extra: Sequence[str]) -> tuple[Plan, LaunchOptions]:
    given = ready.stage.options.get(way, {})
    if own := [f"{way}: {key}: is set by the pipeline; drop it" for key in given if key in _OWN]:
        raise InputError(own)
    options = parse_options(way, [*option_words(given), *extra])
    common = dataclasses.replace(options.common, name=f"{definition.name}-{ready.name}")
    folder = ready.folder.absolute()
    if ready.is_parallel:
        options = dataclasses.replace(options, common=common)
        plan = prepare(way, options, [ready.stage.command, *ready.words])
        # Two evaluations of one run are two jobs.
        check_not_live(folder)
        return dataclasses.replace(plan, run=folder, snapshot=plan.snapshot and folder / "job" / "snapshot"), options
    # One process, which asks for no more than that, whatever suits the trainings.
    slurm = dataclasses.replace(
        options.slurm, nodes=1, ranks_per_node=1, gpus_per_node=ready.stage.own[way].get("gpus_per_node", "")
    )
    local = dataclasses.replace(options.local, processes=1, cpu=True)
    common = dataclasses.replace(common, run=str(folder), launcher="plain", accelerate_config="")
    options = dataclasses.replace(options, common=common, slurm=slurm, local=local)
    # A batch job runs in its copy of the code; here the words stay as they were typed.
    words = absolute_words(ready) if way == "slurm" else ready.words
    return prepare(way, options, ["-m", f"launch.{ready.stage.command}", *words]), options


def option_words(given: Mapping[str, Any]) -> list[str]:
    """Write options of a pipeline file as flags of `signscale launch`."""
    words: list[str] = []
    for key, value in given.items():
        is_on = key in FIELDS and FIELDS[key].default is True
        if value is None:
            raise InputError(f"{key}: needs a value; give one, or leave the line out")
        if isinstance(value, dict):
            raise InputError(f"{key}: expected a value, or a list of them")
        if isinstance(value, list):
            words += [f"--{key}={item}" for item in value]
        elif value == "true":
            words += [] if is_on else [f"--{key}"]
        elif value == "false":
            words += [f"--no_{key}"] if is_on else []
        else:
            words.append(f"--{key}={value}")
    return words


def make_records(definition: Definition, stages: Sequence[Ready]) -> dict[str, StageRecord]:
    """Make what each stage's job folder tells of it."""
    folders = {ready.name: str(ready.job.folder.absolute()) for ready in stages}
    return {
        ready.name: StageRecord(
            pipeline=str(definition.file.absolute()),
            stage=ready.name,
            command=ready.stage.command,
            fingerprint=ready.fingerprint,
            content=dict(ready.content),
            output=None if ready.output is None else str(ready.output.absolute()),
            needs={name: folders[name] for name in ready.stage.after},
            reads=sorted({name for name, _ in ready.stage.references}),
            children={other.name: folders[other.name] for other in stages if ready.name in other.stage.after},
        )
        for ready in stages
    }
