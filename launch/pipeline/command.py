"""The command line of `signscale pipeline`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.jobs.options import parse_options
from launch.pipeline.deciding import Decision, decide
from launch.pipeline.definition import WAYS, Definition, read_definition
from launch.pipeline.local import run_locally
from launch.pipeline.planning import plan_stages
from launch.pipeline.resolving import resolve
from launch.pipeline.slurm import check_clusters, find_queued, submit_pipeline
from launch.prepare import describe
from trainer.errors import InputError
from trainer.options import OptionParser
from trainer.shipped import find_shipped


def main(argv: Sequence[str]) -> int:
    """Check the whole pipeline, then run or submit what is not done yet; return 1 where a stage failed."""
    options, extra = _parse(argv)
    definition = read_definition(find_shipped(options.file))
    stages = resolve(definition)
    decisions = decide(definition, stages, options.start)
    todo = [decision.ready for decision in decisions if decision.run]
    queued = find_queued(todo) if options.on == "slurm" else {}
    planned = plan_stages(definition, [ready for ready in todo if ready.name not in queued], options.on, extra)
    plans = {name: plan for name, (plan, _) in planned.items()}
    if options.on == "slurm":
        check_clusters(stages, plans, queued)
    print(_table(definition, decisions, queued), flush=True)
    if options.dry_run:
        for name, (plan, launch) in planned.items():
            print(f"\nstage {name}\n{describe(plan, launch)}")
        return 0
    if not todo:
        print("nothing to do: every stage is done")
        return 0
    if options.on == "slurm":
        return submit_pipeline(definition, decisions, plans, queued)
    return run_locally(definition, decisions, plans)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and those of the launch."""
    parser = OptionParser(
        prog="signscale pipeline",
        usage="signscale pipeline FILE.yaml [--on local|slurm] [--dry-run] [--from STAGE] [options of launch]",
        description="Run the stages of a pipeline file that are not done yet, each after those it needs. Everything is "
        "checked before the first one starts. Typed again, the same command goes on where it was.",
        epilog="All other options are those of `signscale launch local` or `slurm` and hold for every stage, over what "
        "the file says.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.yaml", help="the pipeline (configs/pipeline.yaml shows all there is)")
    add("--on", choices=WAYS, default="local", help="here, in sequence, or as SLURM jobs (default: local)")
    add("--dry-run", "--dry_run", action="store_true", help="show what would be done, start nothing")
    add("--from", dest="start", metavar="STAGE", help="do STAGE and all after it again, though they are done")
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        # The value of an option of launch could not be told from the file.
        raise InputError(f"signscale pipeline: expected the pipeline's file first, found {argv[0]}")
    options, extra = parser.parse_known_args(list(argv))
    own = ("--on", "--dry-run", "--dry_run", "--from")
    near = [f for word in extra for f in difflib.get_close_matches(word.partition("=")[0], own, n=1, cutoff=0.8)]
    if near:
        raise InputError(f"signscale pipeline: did you mean {near[0]}? --help lists the options")
    parse_options(options.on, extra)
    return options, extra


def _table(definition: Definition, decisions: Sequence[Decision], queued: Mapping[str, str]) -> str:
    rows = [("stage", "command", "after", "what happens")]
    for decision in decisions:
        stage = decision.ready.stage
        action = f"run ({decision.why})" if decision.run else f"skip ({decision.why})"
        if stage.name in queued:
            action = f"is queued or at work as job {queued[stage.name]}"
        rows.append((stage.name, stage.command, ", ".join(stage.after) or "-", action))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"pipeline {definition.name} ({definition.file})", *lines])
