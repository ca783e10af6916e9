"""The command line of `signscale pipeline`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.pipeline.deciding import Decision, decide
from launch.pipeline.definition import WAYS, Definition, read_definition
from launch.pipeline.resolving import resolve
from trainer.options import OptionParser


def main(argv: Sequence[str]) -> int:
    """Check the whole pipeline, then run or submit what is not done yet; return 1 where a stage failed."""
    options = _parse(argv)
    definition = read_definition(options.file)
    stages = resolve(definition)
    decisions = decide(definition, stages, options.start)
    print(_table(definition, decisions), flush=True)
    if options.dry_run:
        return 0
    if not any(decision.run for decision in decisions):
        print("nothing to do: every stage is done")
        return 0
    from launch.pipeline.local import run_locally

    return run_locally(definition, decisions)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale pipeline",
        description="Run the stages of a pipeline file that are not done yet, each after those it needs. Everything is "
        "checked before the first one starts. Typed again, the same command goes on where it was.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.yaml", help="the pipeline (configs/pipeline.yaml shows all there is)")
    add("--on", choices=WAYS, default="local", help="here, in sequence, or as SLURM jobs (default: local)")
    add("--dry-run", "--dry_run", action="store_true", help="show what would be done, start nothing")
    add("--from", dest="start", metavar="STAGE", help="do STAGE and all after it again, though they are done")
    return parser.parse(argv)


def _table(definition: Definition, decisions: Sequence[Decision]) -> str:
    rows = [("stage", "command", "after", "what happens")]
    for decision in decisions:
        stage = decision.ready.stage
        action = f"run ({decision.why})" if decision.run else f"skip ({decision.why})"
        rows.append((stage.name, stage.command, ", ".join(stage.after) or "-", action))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        f"  {decision.ready.name}: signscale {decision.ready.stage.command} {shlex.join(decision.ready.words)}"
        for decision in decisions
    ]
    return "\n".join([f"pipeline {definition.name} ({definition.file})", *lines])
