"""What a launched command is, where it will write, and whether it can run at all: found out before anything starts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import InputError
from trainer.shipped import find_shipped

RECIPE_PATHS = (
    "data_dir",
    "annotations",
    "cache_dir",
    "cost_model",
    "teacher",
    "soft_targets",
    "output_dir",
    "init_from",
)
"""Fields of a recipe that are paths; `resume` is one unless it is `auto`."""

_OPTION_PATHS = {
    "extract": ("checkpoint", "output", "data_dir", "annotations"),
    "evaluate": ("checkpoint", "data_dir", "annotations", "output_dir", "cache_dir", "lm"),
}
MODULES = {name: f"trainer.{name}" for name in ("train", "extract", "evaluate")}
"""Commands that run on several ranks."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that was understood and checked."""

    words: tuple[str, ...]
    """As typed, paths made absolute."""
    module: str
    arguments: tuple[str, ...]
    run: Path
    """Folder whose job directory it gets."""
    recipe: dict[str, object] | None = None
    """The resolved recipe of `train`, flat, paths absolute."""


def understand(command: Sequence[str], *, run: Path | None = None) -> Command:
    """Check a command as its own entry point would, and find where it writes.

    `run` is where a module of the user's own (`-m MODULE …`) keeps its job. Raises `InputError` with every mistake.
    """
    if not command:
        raise InputError(f"nothing to launch; write -- and a command after the options, one of {', '.join(MODULES)}")
    name, *rest = command
    if name == "-m":
        return _understand_module(rest, run)
    if run is not None:
        raise InputError("--run goes with -m MODULE alone; the other commands say themselves where they write")
    if name not in MODULES:
        raise InputError(f"{name!r} is not launched; expected one of {', '.join(MODULES)}, or -m MODULE after --")
    return _understand_train(rest) if name == "train" else _understand_options(name, rest)


def _understand_module(rest: Sequence[str], run: Path | None) -> Command:
    if not rest:
        raise InputError("-m: name the module that every rank shall run")
    if run is None:
        raise InputError(f"-m {rest[0]}: say with --run FOLDER, before --, where its job is to be kept")
    return Command(words=("-m", *rest), module=rest[0], arguments=tuple(rest[1:]), run=run.absolute())


def _understand_train(rest: Sequence[str]) -> Command:
    # Imported here: it takes half a second that a question for help need not wait for.
    from trainer.parsing import parse_recipe

    recipe = parse_recipe(rest, "signscale train").flat()
    for key in RECIPE_PATHS:
        recipe[key] = make_absolute(str(recipe[key]))
    if recipe["resume"] not in ("", "auto"):
        recipe["resume"] = make_absolute(str(recipe["resume"]))
    words = ("train", *_absolute_words(rest, {*RECIPE_PATHS, "resume"}))
    return Command(
        words=words, module=MODULES["train"], arguments=words[1:], run=Path(str(recipe["output_dir"])), recipe=recipe
    )


def _understand_options(name: str, rest: Sequence[str]) -> Command:
    # Loads torch; the command's own parser is the one that knows all that can be wrong.
    from trainer.checkpoint.store import MANIFEST, run_folder_of

    options = importlib.import_module(MODULES[name]).parse_options(rest)
    words = (name, *_absolute_words(rest, set(_OPTION_PATHS[name])))
    checkpoint = Path(options.checkpoint).absolute()
    is_checkpoint = checkpoint.parent.name == "checkpoints" or (checkpoint / MANIFEST).is_file()
    owner = run_folder_of(checkpoint) if is_checkpoint else checkpoint
    if name == "extract":
        run = Path(options.output).absolute() if options.output else owner / "soft_targets" / options.split
    else:
        run = owner / f"evaluation-job-{options.split}"
    return Command(words=words, module=MODULES[name], arguments=words[1:], run=run)


def make_absolute(path: str) -> str:
    """Make a path mean the same in any folder; addresses such as s3://… and empty ones stay."""
    return path if not path or "://" in path else str(Path(path).expanduser().absolute())


def _absolute_words(words: Sequence[str], paths: set[str]) -> list[str]:
    """Make the values of path options absolute, in `--name value` and `--name=value`."""
    made: list[str] = []
    convert: Callable[[str], str] = str
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            convert = _recipe_file if name == "config" else _path_or_auto if name in paths else str
            made.append(f"--{name}={convert(value)}" if equals else word)
        else:
            made.append(convert(word))
    return made


def _recipe_file(value: str) -> str:
    return make_absolute(str(find_shipped(value)))


def _path_or_auto(value: str) -> str:
    return value if value == "auto" else make_absolute(value)
