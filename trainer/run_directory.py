"""The run directory: the only place a run writes to, and the record of what made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.files import FencedFolder, unfenced
from trainer.parsing import dump_recipe, load_recipe
from trainer.recipe import FREE_ON_RESUME, Recipe

RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"
_PACKAGES = ("signscale", "torch", "accelerate", "deepspeed", "numpy", "jiwer", "safetensors", "jsonargparse")


def claim(recipe: Recipe) -> bool:
    """Check that the run directory is new, or is this recipe's and may be gone on with; tell whether it existed.

    Writes nothing. Raises `InputError` if another recipe owns it, naming every difference.
    """
    folder = Path(recipe.run.output_dir)
    stored = folder / RECIPE
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another --output_dir")
    if not stored.exists():
        return False
    if not recipe.run.resume:
        raise InputError(
            f"{folder}: holds a run already; go on with it (--resume auto), choose another --output_dir, or delete it"
        )
    check_same_recipe(load_recipe(stored), recipe, str(stored))
    return True


def make_folder(folder: Path) -> None:
    """Make the run directory. Raises `InputError` if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --output_dir") from error


def check_same_recipe(stored: Recipe, asked: Recipe, where: str) -> None:
    """Raise `InputError` if going on would change what defines the run."""
    before, now = stored.flat(), asked.flat()
    if now["norm"] is None:
        # Left open, it is what the run has settled on.
        now["norm"] = before["norm"]
    changed = [
        f"{where}: {name} is {before[name]!r} there and {now[name]!r} now; go on with the old value, or start a new "
        "--output_dir (--init_from keeps the weights)"
        for name in before
        if name not in FREE_ON_RESUME and _comparable(before[name]) != _comparable(now[name])
    ]
    if changed:
        raise InputError(changed)


def record(recipe: Recipe, *, world_size: int, device: str, fence: Callable[[], None] = unfenced) -> None:
    """Write the resolved recipe, and add this attempt to the record of environments."""
    folder = Path(recipe.run.output_dir)
    run = FencedFolder(folder, fence)
    make_folder(folder)
    try:
        if not (folder / RECIPE).exists():
            run.write_text(RECIPE, dump_recipe(recipe))
        attempts: list[dict[str, Any]] = []
        if (folder / ENVIRONMENT).exists():
            attempts = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        run.write_json(ENVIRONMENT, [*attempts, describe_environment(world_size, device)])
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --output_dir") from error


def describe_environment(world_size: int, device: str) -> dict[str, Any]:
    """Describe what runs: versions, commit, machine, world size; no environment variable, since some are secrets."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": world_size,
        "device": device,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": versions,
        **_describe_code(),
    }


def _describe_code() -> dict[str, Any]:
    """Name the commit of the code that runs: of a launched job's copy, what was noted when it was made."""
    try:
        # The copy lies in the run directory, which may lie in a repository of another state.
        noted = json.loads((Path(__file__).parents[1] / "snapshot.json").read_text(encoding="utf-8"))
        return {"git_commit": noted["commit"], "git_changes": noted["changed"]}
    except FileNotFoundError:
        return {"git_commit": _git("rev-parse", "HEAD"), "git_changes": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str | None:
    """Ask git about the code that runs, wherever the command was typed."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
