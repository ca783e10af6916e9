"""One process, two batches of each phase, every check on: a recipe tried in seconds, or a failure looked at."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pdb
import platform
import sys
import time
import traceback
from pathlib import Path

from launch.jobs.options import DebugOptions
from launch.jobs.place import Command
from launch.jobs.plan import Plan
from launch.local import conclude
from trainer.errors import EXIT_INPUT_ERROR, InputError, format_problems
from trainer.job.directory import ATTEMPT, JOB, AttemptRecord

STOP_AT_FAILURE = "SIGNSCALE_STOP_AT_FAILURE"


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


def run(plan: Plan) -> int:
    raise NotImplementedError
