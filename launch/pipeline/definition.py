"""What a pipeline file says: stages, each with a command, and what comes after what."""

from __future__ import annotations

import re
from collections.abc import Mapping as Dictionary
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.pipeline.reading import Mapping, as_text, nearest, read_yaml
from trainer.errors import InputError

COMMANDS = ("synth", "pack", "train", "evaluate", "extract", "export", "predict", "compare", "score")
"""Commands that may be a stage: those that leave something behind."""

WAYS = ("local", "slurm")
"""Sections of launch options, of the file and of a stage."""

_KEYS = ("name", "output_dir", *WAYS, "stages")
_STAGE_KEYS = ("name", "command", "arguments", "after", *WAYS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\{([A-Za-z0-9_-]+)\.([A-Za-z_]+)\}")
"""{teacher.run}; a pattern such as ann/{split}.csv has no point in it and stays as it is."""

PLACES = ("run", "output")
"""What can be referred to of a stage."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, as it stands in the file."""

    name: str
    command: str
    arguments: tuple[str, ...]
    """Words of the command line, references not yet replaced."""
    after: tuple[str, ...]
    """Stages that have to be done before: those of `after`, and those referred to."""
    options: Dictionary[str, Dictionary[str, Any]]
    """Launch options for each way, the file's with the stage's over them."""
    own: Dictionary[str, Dictionary[str, Any]]
    """Those of the stage alone."""
    line: int

    @property
    def references(self) -> list[tuple[str, str]]:
        """List (stage, place) of each reference."""
        return [match for word in self.arguments for match in _REFERENCE.findall(word)]


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A pipeline, as it stands in the file."""

    file: Path
    name: str
    """Jobs are called NAME-STAGE."""
    output_dir: Path
    """Holds a folder per stage, unless a stage says otherwise, and the pipeline's record."""
    stages: tuple[Stage, ...]
    """In an order in which they can run."""

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def read_definition(path: Path) -> Definition:
    """Read a pipeline file. Raises `InputError` with all that is wrong with its form."""
    content = read_yaml(path)
    problems = [
        f"{path}:{content.lines[key]}: unknown key {key!r}; {nearest(key, _KEYS)}"
        for key in content
        if key not in _KEYS
    ]
    shared = {way: _options(path, content, way, "", problems) for way in WAYS}
    output_dir = content.get("output_dir")
    if not isinstance(output_dir, str):
        problems.append(f"{path}: output_dir: expected a folder that will hold one per stage, e.g. runs/distillation")
        output_dir = "runs"
    name = content.get("name") or Path(output_dir).name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"{path}: name: expected letters, digits, - and _, found {as_text(name)!r}")
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        raise InputError([*problems, f"{path}: stages: expected a list of stages, `- name: teacher` and so on"])
    stages: list[Stage] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping):
            problems.append(f"{path}: stage {number}: expected lines of `key: value`, found {as_text(entry)!r}")
            continue
        previous = stages[-1].name if stages else None
        stages.append(_read_stage(path, entry, number, previous, shared, problems))
    problems += _reference_problems(path, stages)
    if problems:
        raise InputError(problems)
    return Definition(file=path, name=str(name), output_dir=Path(output_dir), stages=_in_order(path, stages))


def _read_stage(
    path: Path,
    entry: Mapping,
    number: int,
    previous: str | None,
    shared: Dictionary[str, Dictionary[str, Any]],
    problems: list[str],
) -> Stage:
    name = entry.get("name")
    where = f"{path}:{entry.line}: stage {name if isinstance(name, str) else number}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"{where}: name: expected letters, digits, - and _, found {as_text(name)!r}")
        name = f"stage-{number}"
    problems += [
        f"{path}:{entry.lines[key]}: stage {name}: unknown key {key!r}; {nearest(key, _STAGE_KEYS)}"
        for key in entry
        if key not in _STAGE_KEYS
    ]
    command = as_text(entry.get("command"))
    if "command" not in entry:
        problems.append(f"{where}: command: not given; expected one of {', '.join(COMMANDS)}")
    elif command not in COMMANDS:
        problems.append(f"{where}: command: {command!r} cannot be a stage; {nearest(command, COMMANDS)}")
    arguments = _words(where, command, entry.get("arguments"), problems)
    if "after" in entry:
        given = entry["after"] if isinstance(entry["after"], list) else [entry["after"]]
        after = [as_text(one) for one in given if one is not None]
    else:
        after = [previous] if previous else []
    own = {way: _options(path, entry, way, f"stage {name}: ", problems) for way in WAYS}
    stage = Stage(
        name=name,
        command=command,
        arguments=tuple(arguments),
        after=(),
        options={way: {**shared[way], **own[way]} for way in WAYS},
        own=own,
        line=entry.line,
    )
    needs = dict.fromkeys([*after, *(referred for referred, _ in stage.references)])
    return Stage(**{**vars(stage), "after": tuple(needs)})


def _options(path: Path, entry: Mapping, way: str, where: str, problems: list[str]) -> dict[str, Any]:
    value = entry.get(way)
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {key.replace("-", "_"): item for key, item in value.items()}
    problems.append(f"{path}:{entry.lines[way]}: {where}{way}: expected options of `launch {way}`, e.g. {{nodes: 2}}")
    return {}


def _words(where: str, command: str, arguments: Any, problems: list[str]) -> list[str]:
    """Make words of a command line from a mapping of options, or take a list as it is."""
    if arguments is None:
        return []
    if isinstance(arguments, list):
        if any(isinstance(word, dict | list) or word is None for word in arguments):
            problems.append(f"{where}: arguments: expected words of a command line, found {as_text(arguments)}")
            return []
        return [str(word) for word in arguments]
    if not isinstance(arguments, dict):
        problems.append(f"{where}: arguments: expected options (`data_dir: corpus`) or a list of words")
        return []
    words: list[str] = []
    for key, value in arguments.items():
        if value is None:
            problems.append(f"{where}: arguments: {key}: needs a value; give one, or leave the line out")
        elif command == "train":
            # A recipe's values are YAML on the command line too.
            words.append(f"--{key}={as_text(value)}")
        elif value == "true":
            words.append(f"--{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(as_text, value)]
        elif value != "false":
            words.append(f"--{key}={as_text(value)}")
    return words


def _reference_problems(path: Path, stages: Sequence[Stage]) -> list[str]:
    problems = []
    names = [stage.name for stage in stages]
    for stage in stages:
        where = f"{path}:{stage.line}: stage {stage.name}"
        if names.count(stage.name) > 1 and stage is not stages[names.index(stage.name)]:
            problems.append(f"{where}: there is another stage of this name; choose another name")
        for name in stage.after:
            if name not in names:
                problems.append(f"{where}: there is no stage {name!r}; {nearest(name, names)}")
        for name, place in stage.references:
            if place not in PLACES:
                problems.append(f"{where}: {{{name}.{place}}}: {nearest(place, PLACES)}")
    return problems


def _in_order(path: Path, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Sort the stages so that each comes after those it needs, otherwise as in the file."""
    ordered: list[Stage] = []
    left = list(stages)
    while left:
        done = {stage.name for stage in ordered}
        ready = next((stage for stage in left if set(stage.after) <= done), None)
        if ready is None:
            circle = _circle(left)
            raise InputError(f"{path}: stages wait for each other: {' after '.join(circle)}; mend their `after`")
        ordered.append(ready)
        left.remove(ready)
    return tuple(ordered)


def _circle(stages: Sequence[Stage]) -> list[str]:
    """Follow what waits for what until a name comes again."""
    waiting = {stage.name: [name for name in stage.after if name in {one.name for one in stages}] for stage in stages}
    path = [stages[0].name]
    while path[-1] not in path[:-1]:
        path.append(waiting[path[-1]][0])
    return path[path.index(path[-1]) :]


def replace_references(word: str, places: Dictionary[tuple[str, str], Path]) -> str:
    """Put folders in place of references."""
    return _REFERENCE.sub(lambda match: str(places[match[1], match[2]]), word)
