"""`signscale logs`: what a job said, all of it or one rank's part, and what it goes on to say."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.evidence import check_task, read_plan
from launch.jobs.following import Printer, follow
from launch.jobs.judging import ACTIVE
from launch.jobs.logs import find_attempt, find_outputs, find_sources
from launch.jobs.report import RunReport, check_is_run, has_job, name_task, report_run
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.job.directory import JobDirectory
from trainer.options import OptionParser, number_from_0

_INTERRUPTED = 130
_WORKING = ("RUNNING", "STOPPING")


def main(argv: Sequence[str]) -> int:
    """Print or follow; Ctrl-C and a closed pipe end it without a word."""
    options = _parse(argv)
    options.run, options.task = name_task(options.run, options.task)
    try:
        return _follow(options) if options.follow else _print(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # `signscale logs RUN | head`: whoever reads has had enough. Python would complain again as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print(options: argparse.Namespace) -> int:
    directory, ranks_per_node = _open(options)
    attempt = find_attempt(directory, options.attempt)
    sources = find_sources(directory, attempt, options.rank, ranks_per_node) if attempt else find_outputs(directory)
    if not any(path.exists() for path in sources):
        print(_explain_silence(options, attempt), file=sys.stderr)
        return 1
    if not Printer(sources, sys.stdout).drain():
        print(f"{' and '.join(map(str, sources))}: nothing has been written yet", file=sys.stderr)
    return 0


def _explain_silence(options: argparse.Namespace, attempt: str | None) -> str:
    report = _report(options)
    state = f"{report.state}: {report.why}"
    if report.way == "debug":
        return f"a debugging run prints to its terminal and keeps no log; {state}"
    whose = f" of attempt {attempt}" if attempt else ""
    if options.rank is not None and not _goes_on(report):
        return f"rank {options.rank}{whose} kept no file of its own; leave --rank out for all there is; {state}"
    what = "no log yet" if options.rank is None else f"rank {options.rank} has written nothing yet"
    return f"{what}{whose}; {state}"


def _follow(options: argparse.Namespace) -> int:
    directory, ranks_per_node = _open(options)

    def find() -> tuple[str, Sequence[Path]] | None:
        attempt = find_attempt(directory, options.attempt)
        return (attempt, find_sources(directory, attempt, options.rank, ranks_per_node)) if attempt else None

    def state() -> tuple[bool, bool, str]:
        report = _report(options)
        over = not _goes_on(report) or (options.attempt is not None and has_ended(options.attempt))
        return over, report.state in _WORKING, f"{report.state}: {report.why}"

    def has_ended(attempt: str) -> bool:
        return any(record.attempt == attempt and record.ended is not None for record in directory.history()) or (
            (word := directory.last_word()) is not None and word.attempt == attempt
        )

    find()
    print(f"--- {follow(find, state, has_ended=has_ended, out=sys.stdout)}", file=sys.stderr)
    return 0


def _goes_on(report: RunReport) -> bool:
    # Where SLURM does not answer, it may at the next look.
    return report.state in ACTIVE or report.state in ("UNKNOWN", "PREPARING")


def _open(options: argparse.Namespace) -> tuple[JobDirectory, int | None]:
    run = options.run
    check_is_run(run)
    if not has_job(run):
        raise InputError(f"{run}: was not launched, so nothing kept what it printed; metrics.jsonl has its figures")
    directory = JobDirectory.of(run)
    plan = read_plan(directory) or {}
    tasks = plan.get("tasks") or []
    if options.task is None and tasks:
        raise InputError(f"{run}: is an array of {len(tasks)} tasks; name one: --task 0 to --task {len(tasks) - 1}")
    if options.task is not None:
        check_task(options.task, tasks)
        directory = JobDirectory.of(Path(tasks[options.task]["run"]))
    value = plan.get("ranks_per_node")
    return directory, value if isinstance(value, int) and value > 0 else None


def _report(options: argparse.Namespace) -> RunReport:
    report = report_run(options.run)
    return report if options.task is None else report.tasks[options.task]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale logs",
        description="What a job said: the newest attempt's log, of all nodes and ranks.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory")
    add("-f", "--follow", action="store_true", help="go on printing, over requeues, until the job is over")
    add("--rank", type=number_from_0, metavar="R", help="only what this rank wrote (default: everything)")
    add("--task", type=number_from_0, metavar="N", help="of an array: which task")
    add("--attempt", metavar="A", help="an older attempt, as `signscale status` lists them (default: the newest)")
    return parser.parse(argv)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
