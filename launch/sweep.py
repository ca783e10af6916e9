"""Sweeps: every combination of a few settings, a run each (`--sweep dropout=0.2,0.3 --sweep seed=1,2`)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError

_FIXED = ("output_dir", "resume", "config", "print_config")
"""Each run has its own folder and goes on in it."""
_SAFE = re.compile(r"[^A-Za-z0-9._+=,\-]")
_LONGEST_NAME = 120


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting and the values it takes."""

    key: str
    values: tuple[str, ...]
    """As typed."""


@dataclass(frozen=True, kw_only=True)
class SweepTask:
    """One run of a sweep."""

    run: Path
    settings: dict[str, str]
    """The swept settings, as typed."""

    @property
    def overrides(self) -> dict[str, Any]:
        """Flags that come after the command's own."""
        return {**self.settings, "output_dir": str(self.run)}

    @property
    def words(self) -> list[str]:
        """The same, as words of a command line."""
        return [f"--{key}={value}" for key, value in self.overrides.items()]


def parse_axes(specifications: Sequence[str]) -> tuple[Axis, ...]:
    """Read what `--sweep` was given. Raises `InputError` with every mistake of form."""
    from trainer.parsing import field_names

    problems: list[str] = []
    axes: list[Axis] = []
    known = [name for name in field_names() if name not in _FIXED]
    for text in specifications:
        key, equals, rest = text.partition("=")
        key = key.strip().lstrip("-")
        values = tuple(value.strip() for value in _split(rest))
        if not equals or not all(values):
            problems.append(f"--sweep {text}: expected KEY=VALUE,VALUE, e.g. learning_rate=1e-4,3e-4")
        elif key in _FIXED:
            problems.append(f"--sweep {text}: {key} cannot be swept; every run has its own folder, and goes on in it")
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "signscale train --help lists the settings"
            problems.append(f"--sweep {text}: there is no setting {key!r}; {hint}")
        elif any(axis.key == key for axis in axes):
            problems.append(f"--sweep {text}: {key} is swept twice; list all of its values once")
        else:
            axes.append(Axis(key=key, values=values))
    if problems:
        raise InputError(problems)
    return tuple(axes)


def _split(text: str) -> list[str]:
    """Split at the commas that stand in no bracket: "[a, b],[c]" are two values."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def make_tasks(arguments: Sequence[str], axes: Sequence[Axis]) -> tuple[SweepTask, ...]:
    """Combine the axes into tasks, the last axis fastest; each run lies in the recipe's output_dir.

    `arguments` are those of `train`. Raises `InputError` with every value that the recipe refuses, and every
    combination that is impossible.
    """
    from trainer.parsing import parse_recipe
    from trainer.recipe import Recipe, combination_problems

    base = parse_recipe(arguments, check=False)
    given = {word[2:].partition("=")[0] for word in arguments if word.startswith("--")}
    problems = [f"--sweep {axis.key}: --{axis.key} is given too; drop that" for axis in axes if axis.key in given]
    typed: list[list[Any]] = []
    for axis in axes:
        found: list[Any] = []
        for value in axis.values:
            try:
                recipe = parse_recipe([*arguments, f"--{axis.key}={value}"], check=False)
            except InputError as error:
                problems += [f"--sweep {axis.key}: {problem}" for problem in error.problems]
                continue
            if recipe.flat()[axis.key] in found:
                problems.append(f"--sweep {axis.key}: {value} stands there twice; drop one")
            found.append(recipe.flat()[axis.key])
        typed.append(found)
    if problems:
        raise InputError(dict.fromkeys(problems))
    out = Path(base.run.output_dir)
    keys = [axis.key for axis in axes]
    tasks = []
    for texts, values in zip(
        itertools.product(*(axis.values for axis in axes)), itertools.product(*typed), strict=True
    ):
        settings = dict(zip(keys, texts, strict=True))
        recipe = Recipe.from_flat(_without_derived(base, arguments) | dict(zip(keys, values, strict=True)))
        label = ", ".join(f"{key} {value}" for key, value in settings.items())
        problems += [f"{label}: {problem}" for problem in combination_problems(recipe)]
        tasks.append(SweepTask(run=out / folder_name(settings), settings=settings))
    folders = [task.run for task in tasks]
    problems += [f"{run}: two combinations would get this folder" for run in folders if folders.count(run) > 1]
    if problems:
        raise InputError(_once(problems))
    return tuple(tasks)


def _without_derived(recipe: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's fields without those that follow from the architecture, unless they were given."""
    from trainer.recipe import ARCHITECTURE_HEADS, ModelRecipe

    flat = dict(recipe.flat())
    defaults = ModelRecipe(model=recipe.model.model)
    for name in ("rnn_size", "rnn_layers"):
        if flat[name] == getattr(defaults, name) and recipe.model.model in ARCHITECTURE_HEADS:
            # A swept `model` brings its own size; the same size typed by hand cannot be told apart here, and is checked
            # again when the run starts.
            flat.pop(name)
    return flat


def _once(problems: Sequence[str]) -> list[str]:
    """Say a problem once that many combinations have, with the first of them."""
    found: dict[str, str] = {}
    for problem in problems:
        found.setdefault(problem.partition(": ")[2], problem)
    return list(found.values())


def folder_name(settings: dict[str, str]) -> str:
    """Name a run by its settings: learning_rate=1e-4,dropout=0.2; what no folder should be called gets a hash."""
    plain = ",".join(f"{key}={value}" for key, value in settings.items())
    safe = _SAFE.sub("_", plain)
    if safe == plain and len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[: _LONGEST_NAME - 9]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def describe(axes: Sequence[Axis], tasks: Sequence[SweepTask]) -> dict[str, Any]:
    """Return the sweep's record, as sweep.json keeps it."""
    return {
        "axes": [dataclasses.asdict(axis) for axis in axes],
        "tasks": [{"run": str(task.run.absolute()), "settings": task.settings} for task in tasks],
    }
