"""Finding runs below a folder: never outside it, not through links, not in what runs hold themselves."""

from __future__ import annotations

import os
from pathlib import Path

from launch.jobs.report import is_run
from trainer.errors import InputError

_SKIPPED = frozenset({"job", "snapshot", "checkpoints", "tensorboard", "wandb", "__pycache__", "node_modules"})
"""Folders that hold no runs and may hold very much."""


def find_runs(folder: Path) -> tuple[list[Path], list[str]]:
    """List the runs in a folder and below it, sorted, and the problems: folders that cannot be read.

    Raises `InputError` where the folder itself is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
    runs: list[Path] = []
    problems: list[str] = []
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            if is_run(current):
                runs.append(current)
            with os.scandir(current) as entries:
                waiting += [
                    Path(entry.path)
                    for entry in entries
                    if entry.name not in _SKIPPED
                    and not entry.name.startswith(".")
                    and entry.is_dir(follow_symlinks=False)
                ]
        except FileNotFoundError:
            # Gone since it was listed.
            continue
        except OSError as error:
            problems.append(f"{error.filename or current}: cannot be read ({error.strerror})")
    return sorted(runs), problems
