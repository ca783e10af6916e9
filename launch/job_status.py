"""`signscale status`: what a run and its job are doing, how far they are, and what to type next."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.report import RunReport, report_run
from launch.jobs.traces import Progress
from launch.jobs.words import lay_out, say_ago, say_duration, say_time
from trainer.exits import exit_on_input_error
from trainer.job.directory import AttemptRecord
from trainer.options import OptionParser


def main(argv: Sequence[str]) -> int:
    """Print the report."""
    options = _parse(argv)
    report = report_run(options.run)
    print(json.dumps(report.as_dict(), indent=1) if options.json else format_report(report, time.time()))
    return 0


def format_report(report: RunReport, now: float) -> str:
    """Lay a report out for a terminal."""
    way = f"launched: {report.way}" if report.way else "not launched"
    lines = [f"{report.state}  {report.run}  ({report.name}, {way})", f"  {report.why}"]
    lines += [f"  note: {note}" for note in report.notes]
    if report.progress is not None:
        lines += ["", *(f"  {line}" for line in _say_progress(report.progress, now))]
    if report.outlook:
        lines.append(f"  {report.outlook}")
    if report.tasks:
        rows = [
            (str(number), task.state, task.name, _step(task.progress), task.why)
            for number, task in enumerate(report.tasks)
        ]
        lines += ["", *(f"  {line}" for line in lay_out([("TASK", "STATE", "NAME", "STEP", ""), *rows]))]
    if report.attempts:
        lines += ["", *(f"  {line}" for line in _tabulate(report.attempts, now))]
    if report.last_lines:
        lines += ["", f"  last lines of {report.log}:", *(f"    {line}" for line in report.last_lines)]
    if report.next:
        lines += ["", "next:", *(f"  {command}" for command in report.next)]
    return "\n".join(lines)


def _say_progress(progress: Progress, now: float) -> list[str]:
    parts = []
    if progress.step is not None:
        parts.append(f"step {_step(progress)}")
    if progress.epoch is not None:
        parts.append(f"epoch {progress.epoch}")
    if progress.saved is not None:
        parts.append(f"saved at step {progress.saved}")
    if progress.steps_per_second:
        rate = progress.steps_per_second
        parts.append(f"{rate:.2f} steps/s" if rate >= 0.1 else f"{1 / rate:.0f} s a step")
    if progress.heard is not None:
        parts.append(f"last heard of {say_ago(progress.heard, now)}")
    metrics = progress.say_metrics()
    return [", ".join(parts), *([metrics] if metrics else [])]


def _step(progress: Progress | None) -> str:
    if progress is None or progress.step is None:
        return "-"
    return f"{progress.step} of {progress.total}" if progress.total else str(progress.step)


def _tabulate(attempts: Sequence[AttemptRecord], now: float) -> list[str]:
    rows = [("ATTEMPT", "NODES", "BEGAN", "TOOK", "STEPS", "ENDED")]
    before = 0
    for record in attempts:
        steps = "-" if record.step is None else f"{before} to {record.step}"
        before = record.step if record.step is not None else before
        took = say_duration(record.ended - record.began) if record.ended is not None else "-"
        end = "not yet, as far as its record goes"
        if record.ended is not None:
            end = f"{record.word or 'without a word'}: {record.reason or ''}"
        rows.append((record.attempt, record.nodes or record.host or "-", say_time(record.began, now), took, steps, end))
    return lay_out(rows)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale status",
        description="What a run and its job are doing: SLURM is asked first, then the run's own files.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the report")
    return parser.parse(argv)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
