"""`signscale launch debug|local|slurm [options] -- COMMAND`: three ways in, one plan."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.jobs.options import LaunchOptions, make_parser, parse_options
from launch.jobs.plan import WAYS, Plan, Way
from launch.prepare import describe, missing_paths, prepare, write
from trainer.errors import InputError
from trainer.exits import EXIT_INPUT_ERROR, exit_on_input_error

_USAGE = """usage: signscale launch WAY [options] -- COMMAND [its options]

ways:
  debug  one process, two batches of each phase, every check on; --break enters the debugger where it fails
  local  all devices of this machine; Ctrl-C saves and stops
  slurm  a job on a cluster's nodes; survives preemption, time limits and dead nodes

COMMAND is train, evaluate or extract (or -m MODULE). The same command launched again goes on where it was.
`signscale launch WAY --help` lists the options of a way; --dry_run prints the plan and starts nothing.
"""


def main(argv: Sequence[str]) -> int:
    """Launch a command; return its exit code, or 0 once a batch job is queued."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if argv else EXIT_INPUT_ERROR
    way = _way(argv[0])
    own, command = _split(argv[1:])
    if "-h" in own or "--help" in own:
        make_parser(way).print_help()
        return 0
    options = parse_options(way, own)
    if options.sweep:
        from launch.sweep.start import launch_sweep

        return launch_sweep(way, options, command)
    return launch(prepare(way, options, command), options)


def launch(plan: Plan, options: LaunchOptions) -> int:
    """Print the plan, and start it unless this is a dry run."""
    print(describe(plan, options))
    for path in missing_paths(plan) if plan.way == "slurm" else []:
        print(f"warning: {path} is not there on this machine; the job needs it on the nodes", file=sys.stderr)
    if options.dry_run:
        if plan.way == "slurm":
            from launch.slurm.script import render

            print(f"\n{render(plan)}", end="")
        return 0
    sys.stdout.flush()
    if plan.way == "slurm":
        return _submit(plan)
    if plan.way == "local":
        from launch import local

        return local.run(write(plan))
    from launch import debug

    return debug.run(plan, options.debug)


def _submit(plan: Plan) -> int:
    from launch.slurm.submit import foresee, require_cluster, submit

    require_cluster()
    plan = write(plan)
    trouble = foresee(plan.job.script, job=plan.job)
    job_id = submit(plan.job.script, job=plan.job)
    if trouble:
        print(f"warning: the job may never start: {trouble}", file=sys.stderr)
    print(f"\nqueued as job {job_id}; next:")
    for command in ("status", "logs -f", "cancel"):
        print(f"  signscale {command} {plan.run}")
    return 0


def _way(word: str) -> Way:
    for way in WAYS:
        if word == way:
            return way
    raise InputError(f"signscale launch: unknown way {word!r}; expected one of {', '.join(WAYS)}")


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" in words:
        place = list(words).index("--")
        return list(words[:place]), list(words[place + 1 :])
    return list(words), []


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
