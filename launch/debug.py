"""One process, two batches of each phase, every check on: a recipe tried in seconds, or a failure looked at."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pdb
import platform
import runpy
import shutil
import sys
import time
import traceback
from pathlib import Path

from launch.jobs.options import DebugOptions
from launch.jobs.place import Command
from launch.jobs.plan import Plan
from launch.prepare import write
from trainer.errors import InputError, format_problems
from trainer.exits import EXIT_INPUT_ERROR, Outcome
from trainer.job.directory import ATTEMPT, JOB, TOKEN, AttemptRecord


def tame(command: Command, options: DebugOptions) -> Command:
    """Return the command at its smallest: a run of its own beside the real one, two batches, no threads."""
    if command.recipe is None:
        return command
    recipe = dict(command.recipe)
    clips = int(recipe["batch_size"]) * int(recipe["gradient_accumulation_steps"]) * options.batches  # type: ignore[call-overload]
    folder = Path(f"{recipe['output_dir']}-debug")
    recipe |= {
        "output_dir": str(folder),
        "epochs": 1,
        "warmup_epochs": min(0.5, float(recipe["warmup_epochs"])),  # type: ignore[arg-type]
        "max_steps": options.batches,
        "stop_after_steps": 0,
        "limit_clips": clips,
        "train_wer_clips": min(clips, int(recipe["train_wer_clips"])),  # type: ignore[call-overload]
        "num_workers": 0,
        "deterministic": True,
        "detect_anomaly": True,
        "compile": False,
        "log_every": 1,
        "evaluate_every": 0,
        "save_every": 0,
        "target_wer": None,
        "early_stopping_patience": 0,
        "trackers": [],
        "resume": "",
    }
    return dataclasses.replace(command, run=folder, recipe=recipe)


def run(plan: Plan, options: DebugOptions) -> int:
    """Run the command in this process, from the beginning; return its exit code."""
    if plan.recipe is not None:
        _clear(plan)
    plan = write(plan)
    job = plan.job
    attempt = f"local-{int(time.time())}-{os.getpid()}"
    job.begin(AttemptRecord(attempt=attempt, began=time.time(), host=platform.node(), pid=os.getpid()))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= {JOB: str(job.folder), ATTEMPT: attempt, TOKEN: attempt}
    try:
        outcome = _call(plan, options)
    except BaseException as error:
        job.end(attempt, step=None, word=None, reason=f"ended by {type(error).__name__}")
        raise
    job.leave_word(outcome.word, attempt=attempt, step=outcome.step, reason=outcome.reason, code=int(outcome))
    job.end(attempt, step=outcome.step, word=outcome.word, reason=outcome.reason)
    return int(outcome)


def _call(plan: Plan, options: DebugOptions) -> Outcome:
    """Call the command's entry point; show what it raises, and stop there if asked to."""
    try:
        returned = _start(plan)
    except InputError as error:
        print(format_problems(error.problems), file=sys.stderr)
        return Outcome(EXIT_INPUT_ERROR, "; ".join(error.problems), word="FAILED")
    except Exception as error:
        traceback.print_exc()
        if options.stop_at_failure:
            pdb.post_mortem(error.__traceback__)
        return Outcome(1, f"{type(error).__name__}: {error}", word="FAILED")
    if isinstance(returned, Outcome):
        return returned
    return Outcome(returned, f"left with exit code {returned}", word="FAILED" if returned else "DONE")


def _start(plan: Plan) -> int:
    if plan.command[0] != "-m":
        # An outcome of 0 says more than 0 does.
        code: int = importlib.import_module(plan.module).main(list(plan.arguments))
        return code
    # A module of the user's own is run as `python -m` would.
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = [plan.module, *plan.arguments]
    try:
        runpy.run_module(plan.module, run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


def _clear(plan: Plan) -> None:
    """Delete what an earlier debugging run left; never anything else."""
    if not plan.run.exists():
        return
    if not plan.job.plan.exists() or Plan.load(plan.job.plan).way != "debug":
        raise InputError(f"{plan.run}: is there, and no debugging run made it; move it, or name another --output_dir")
    shutil.rmtree(plan.run)
