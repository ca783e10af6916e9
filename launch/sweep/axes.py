"""Sweeps: every combination of a few settings, a run each (`--sweep dropout=0.2,0.3 --sweep seed=1,2`)."""

from __future__ import annotations

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
    def words(self) -> list[str]:
        """Flags that come after the command's own."""
        return [f"--{key}={value}" for key, value in {**self.settings, "output_dir": str(self.run)}.items()]

    @property
    def label(self) -> str:
        """The settings, for people."""
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())


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

    `arguments` are those of `train`. Raises `InputError` with every value that the recipe refuses; whether a
    combination is possible shows when its own recipe is parsed.
    """
    from trainer.parsing import parse_recipe

    base = parse_recipe(arguments, check=False)
    given = {word[2:].partition("=")[0] for word in arguments if word.startswith("--")}
    problems = [f"--sweep {axis.key}: --{axis.key} is given too; drop that" for axis in axes if axis.key in given]
    for axis in axes:
        found: list[Any] = []
        for value in axis.values:
            try:
                typed = parse_recipe([*arguments, f"--{axis.key}={value}"], check=False).flat()[axis.key]
            except InputError as error:
                problems += [f"--sweep {problem.removeprefix('command line: ')}" for problem in error.problems]
                continue
            if typed in found:
                problems.append(f"--sweep {axis.key}: {value} stands there twice; drop one")
            found.append(typed)
    combinations = itertools.product(*(axis.values for axis in axes))
    settings = [dict(zip([axis.key for axis in axes], values, strict=True)) for values in combinations]
    names = [folder_name(one) for one in settings]
    problems += [f"{name}: two combinations would get this folder" for name in names if names.count(name) > 1]
    if problems:
        raise InputError(dict.fromkeys(problems))
    out = Path(base.run.output_dir)
    return tuple(SweepTask(run=out / name, settings=one) for name, one in zip(names, settings, strict=True))


def folder_name(settings: dict[str, str]) -> str:
    """Name a run by its settings: learning_rate=1e-4,dropout=0.2; what no folder should be called gets a hash."""
    plain = ",".join(f"{key}={value}" for key, value in settings.items())
    safe = _SAFE.sub("_", plain)
    if safe == plain and len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[: _LONGEST_NAME - 9]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
