"""From YAML files and flags to a recipe: defaults < --config FILE < flags, all problems reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from trainer.errors import InputError
from trainer.recipe import GROUPS, Recipe, combination_problems
from trainer.shipped import find_shipped

set_parsing_settings(docstring_parse_attribute_docstrings=True)


_TYPES = {f.name: str(f.type) for kind in GROUPS.values() for f in dataclasses.fields(kind)}
_LISTS = {name for name, kind in _TYPES.items() if kind.startswith("list")}
_SWITCHES = {name for name, kind in _TYPES.items() if kind == "bool"}
_OPTIONAL = {name for name, kind in _TYPES.items() if kind.endswith("None")}


def parse_recipe(
    argv: Sequence[str], prog: str = "signscale train", *, check: bool = True, needs_corpus: bool = True
) -> Recipe:
    """Parse flags, and the files that `--config` names, into a recipe.

    `check`: whether impossible combinations are refused; `needs_corpus`: whether a recipe without a corpus is one.
    `--help` and `--print_config` print and exit 0. Raises `InputError` with every unknown key (and the nearest known
    one), wrong type and impossible combination in one go, each naming the file or the command line.
    """
    parser = _make_parser(prog)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        raise SystemExit(0)
    print_config = "--print_config" in argv
    problems: list[str] = []
    values: dict[str, Any] = {}
    bad: set[str] = set()
    for origin, key, raw in _settings([word for word in argv if word != "--print_config"], problems):
        try:
            # One key at a time, so that one bad value does not hide the next one.
            values[key] = _parse_value(parser, key, raw)
            bad.discard(key)
        except ArgumentError as error:
            bad.add(key)
            problems.append(f"{origin}: {key}: {_reason(error)}")
    recipe = Recipe.from_flat(values)
    if print_config:
        if problems:
            raise InputError(problems)
        print(dump_recipe(recipe), end="")
        raise SystemExit(0)
    if check or problems:
        # A combination that involves a bad key would be judged on that key's default.
        found = combination_problems(recipe, needs_corpus=needs_corpus)
        problems += [problem for problem in found if not any(re.search(rf"\b{key}\b", problem) for key in bad)]
    if problems:
        raise InputError(problems)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as the flat YAML that `--config` reads."""
    return yaml.safe_dump(_plain(recipe.flat()), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe that `dump_recipe` wrote, with the checks of `parse_recipe` except those of combinations."""
    return parse_recipe(["--config", str(path)], check=False)


def field_names() -> list[str]:
    """List the flat names of all recipe fields."""
    return [field.name for kind in GROUPS.values() for field in dataclasses.fields(kind)]


def _make_parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, exit_on_error=False, description="Train a sign-language recognition model.")
    parser.add_argument(
        "--config",
        type=str,
        help="YAML recipe, yours or one of ours (configs/…); again: the later file wins.",
    )
    parser.add_argument("--print_config", action="store_true", help="Print the resolved recipe and exit.")
    for kind in GROUPS.values():
        parser.add_class_arguments(kind, None)
    return parser


def _settings(argv: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (origin, key, value) of the config files, then of the flags; append what names nothing to `problems`."""
    known = field_names()
    flags = list(_split_flags(argv, problems))
    for name in (value for key, value in flags if key == "config" and value is not None):
        for key, value in _read_yaml(name, problems).items():
            if value is None and key in known and key not in _OPTIONAL:
                problems.append(f"{name}: {key}: needs a value; give one, or leave the line out")
            elif key in known:
                yield str(name), key, value
            else:
                problems.append(f"{name}: unknown key {key!r}{_nearest(str(key), known)}")
    for key, value in flags:
        if value is None and key not in _SWITCHES and key in (*known, "config"):
            problems.append(f"command line: {key}: needs a value; write --{key} VALUE")
        elif key in known:
            yield "command line", key, "true" if value is None else value
        elif key != "config":
            problems.append(
                f"command line: unknown flag --{key}{_nearest(key, [*known, 'config', 'print_config'], '--')}"
            )


def _split_flags(argv: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Split `--key value`, `--key=value`, `--key` (None) and `--key a b` (a list)."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"command line: {word!r} belongs to no flag; write --name value")
            continue
        key, equals, value = word[2:].partition("=")
        following: list[str] = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            following.append(words.pop(0))
        yield key, None if not following else following[0] if len(following) == 1 else following


def _read_yaml(name: Any, problems: list[str]) -> dict[Any, Any]:
    path = find_shipped(str(name))
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path}: cannot read the recipe ({error.strerror}); check the path given with --config")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not a YAML file: {' '.join(str(error).split())}")
    else:
        if loaded is None or isinstance(loaded, dict):
            return loaded or {}
        problems.append(f"{path}: expected lines of `key: value`, found a {type(loaded).__name__}")
    return {}


def _parse_value(parser: ArgumentParser, key: str, raw: Any) -> Any:
    if isinstance(raw, str) and key in _LISTS and not raw.startswith("["):
        raw = [raw]
    if isinstance(raw, str):
        # Strings go the way of flags, where "3e-4", "[a, b]" and "{pose: [0, 3]}" are YAML.
        return _builtin(parser.parse_args([f"--{key}={raw}"], defaults=False)[key])
    return _builtin(parser.parse_object({key: raw}, defaults=False)[key])


def _builtin(value: Any) -> Any:
    """Strip jsonargparse's types of restricted numbers, which neither YAML nor torch knows."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, int) else float(value)


def _reason(error: ArgumentError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    # The first line only repeats the key; the rest says what was expected and what was found.
    return "; ".join(line for line in lines if line and not line.startswith("Parser key")) or str(error)


def _nearest(key: str, known: Sequence[str], dashes: str = "") -> str:
    match = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {dashes}{match[0]}?" if match else "; --help lists what there is"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
