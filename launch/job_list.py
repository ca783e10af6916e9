"""`signscale jobs`: the runs below a folder, a line each: what each of them is doing, and where."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.finding import find_runs
from launch.jobs.report import RunReport, report_runs
from launch.jobs.words import lay_out
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser


def main(argv: Sequence[str]) -> int:
    """Print the table; return 1 where something could not be read."""
    options = _parse(argv)
    runs: dict[Path, None] = {}
    problems: list[str] = []
    for folder in options.folders:
        found, unreadable = find_runs(folder)
        runs |= dict.fromkeys(found)
        problems += unreadable
    reports, broken = report_runs(list(runs))
    problems += broken
    # The tasks of an array are runs too, and are shown below it.
    inside = {task.run.resolve() for report in reports for task in report.tasks}
    reports = [report for report in reports if report.run.resolve() not in inside]
    if options.active:
        reports = [report for report in reports if report.is_active]
    if options.json:
        print(json.dumps({"runs": [report.as_dict() for report in reports], "problems": problems}, indent=1))
    else:
        _print_table(reports, options)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _print_table(reports: Sequence[RunReport], options: argparse.Namespace) -> None:
    if not reports:
        where = ", ".join(map(str, options.folders))
        print(f"no {'active ' if options.active else ''}runs in {where}")
        return
    rows: list[tuple[str, ...]] = [("STATE", "RUN", "JOB", "STEP", "DEV WER", "")]
    for report in reports:
        rows.append(_row(report, str(report.run)))
        rows += [_row(task, f"  {task.name}") for task in report.tasks]
    print("\n".join(lay_out(rows)))
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    for note in notes:
        print(f"note: {note}")


def _row(report: RunReport, label: str) -> tuple[str, ...]:
    progress = report.progress
    job = report.job.job_id if report.job else (report.job_ids[-1] if report.job_ids else report.way or "-")
    step, wer = "-", "-"
    if progress is not None and progress.step is not None:
        step = f"{progress.step}/{progress.total}" if progress.total else str(progress.step)
    if progress is not None and "val/wer" in progress.metrics:
        wer = f"{progress.metrics['val/wer']:.2f} %"
    return (report.state, label, job, step, wer, report.why)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale jobs",
        description="The runs below a folder, a line each. SLURM is asked where it is there; without it the runs' own "
        "files tell.",
        epilog="`signscale status RUN` says more of one.",
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", default=[Path()], help="where to look (default: here)"
    )
    parser.add_argument("--active", action="store_true", help="only those that run or wait")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser.parse(argv)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
