"""`signscale cancel`: the end of a job, once it has saved."""

from __future__ import annotations

import argparse
import getpass
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.ending import cancel
from launch.jobs.evidence import check_task, read_plan
from launch.jobs.report import check_is_run, has_job, name_task, report_run
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.job.directory import JobDirectory
from trainer.options import OptionParser, number_from_0, positive_number

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Cancel; return 1 where something could not be ended."""
    options = _parse(argv)
    typed = options.run
    options.run, options.task = name_task(options.run, options.task)
    _check(options)
    try:
        outcome = cancel(
            options.run,
            task=options.task,
            at_once=options.now,
            patience=options.timeout,
            reason=f"cancelled by {_user()} on {platform.node()}",
            say=lambda text: print(text, flush=True),
        )
    except KeyboardInterrupt:
        print("\nno longer waiting; the request to save and leave stands, and the job is not requeued", file=sys.stderr)
        return _INTERRUPTED
    for line in outcome.lines:
        print(line, file=sys.stderr if outcome.code else sys.stdout)
    report = report_run(typed)
    print(f"{report.state}: {report.why}")
    for command in report.next[:1]:
        print(f"  {command}")
    return outcome.code


def _check(options: argparse.Namespace) -> None:
    check_is_run(options.run)
    if not has_job(options.run):
        raise InputError(
            f"{options.run}: was not launched, so there is no job to cancel; stop its process (Ctrl-C saves)"
        )
    tasks = (read_plan(JobDirectory.of(options.run)) or {}).get("tasks") or []
    check_task(options.task, tasks)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user without a name.
        return "somebody"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale cancel",
        description="End a job for good: it is asked to save and leave, and is not requeued; what has not begun is "
        "taken out of the queue. Only jobs that the run itself recorded are touched.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory")
    add("--now", action="store_true", help="do not wait for a save: what was done since the last one is lost")
    add(
        "--timeout",
        type=positive_number,
        default=600.0,
        metavar="S",
        help="end it at once if it has not left after S seconds (default: 600)",
    )
    add("--task", type=number_from_0, metavar="N", help="of an array: only this task")
    return parser.parse(argv)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
