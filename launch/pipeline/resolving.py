"""A pipeline made ready: each stage's command line parsed as the command itself does, its folders known."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.pipeline.definition import Definition, Stage, replace_references
from launch.pipeline.record import identity
from trainer.errors import InputError
from trainer.job.directory import JobDirectory
from trainer.recipe import FREE_ON_RESUME, Recipe

_QUESTIONS = {"-h", "--help", "--print_config"}
# Of a recipe: how the labour is divided and reported, which leaves the same weights.
_LABOUR = frozenset(
    (
        "num_workers",
        "cache_dir",
        "cache_gb",
        "cost_model",
        "max_frames_per_microbatch",
        "activation_checkpointing",
        "compile",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "trackers",
        "wandb_project",
        "resume",
        "target_ratio",
    )
)
_PARALLEL = {"train": "trainer.train", "evaluate": "trainer.evaluate", "extract": "trainer.extract"}
"""Commands that run on any number of ranks."""
_TEXT_PATHS = ("source", "out", "annotations", "data_dir", "lm")
"""Options of the other commands that name paths and are kept as text."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A stage that can be started."""

    stage: Stage
    words: tuple[str, ...]
    """Its command line, without the command."""
    folder: Path
    """Holds its job: the run directory of a training, otherwise OUTPUT_DIR/<stage>."""
    output: Path | None
    """What it leaves behind; None: what it prints, which is in its log."""
    content: Mapping[str, Any]
    """What defines its result: a recipe's fields, or the words; compared with those of a stage done before."""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def job(self) -> JobDirectory:
        """Where its attempts are recorded."""
        return JobDirectory.of(self.folder)

    @property
    def is_parallel(self) -> bool:
        """Whether it runs on several ranks."""
        return self.stage.command in _PARALLEL

    @property
    def fingerprint(self) -> str:
        """Hash of what defines its result."""
        text = json.dumps([self.stage.command, dict(self.content)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def identity(self) -> str | None:
        """Name what it left behind; None where it is not done."""
        return identity(self.job, self.stage.command, None if self.output is None else str(self.output))


def resolve(definition: Definition) -> tuple[Ready, ...]:
    """Parse every stage's command. Raises `InputError` with the problems of all stages."""
    problems: list[str] = []
    places: dict[tuple[str, str], Path] = {}
    ready: list[Ready] = []
    for stage in definition.stages:
        where = f"{definition.file}:{stage.line}: stage {stage.name}"
        missing = [f"{{{name}.{place}}}" for name, place in stage.references if (name, place) not in places]
        if missing:
            # Of a stage that has problems itself there is nothing more to say here.
            owners = {name for name, place in stage.references if (name, place) not in places}
            if owners <= {one.name for one in ready}:
                problems.append(f"{where}: {', '.join(missing)}: {_mend(missing, ready)}")
            continue
        words = tuple(replace_references(word, places) for word in stage.arguments)
        try:
            found = _resolve_stage(stage, words, definition.output_dir / stage.name)
        except InputError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
            continue
        ready.append(found)
        if stage.command == "train":
            places[stage.name, "run"] = found.folder
        if found.output is not None:
            places[stage.name, "output"] = found.output
    problems += _shared_folders(definition, ready)
    if problems:
        raise InputError(problems)
    return tuple(ready)


def _mend(missing: Sequence[str], ready: Sequence[Ready]) -> str:
    if any(name.endswith(".run}") for name in missing):
        return "only a train stage is a run; {NAME.output} is what another one leaves behind"
    return f"that stage leaves no folder behind; {len(ready)} stages stand before this one"


def _resolve_stage(stage: Stage, words: tuple[str, ...], folder: Path) -> Ready:
    questions = sorted(_QUESTIONS & set(words))
    if questions:
        raise InputError(f"{', '.join(questions)}: asks a question, which is no work for a stage; drop it")
    if stage.command != "train":
        options = _parse(stage.command, words)
        return Ready(
            stage=stage,
            words=words,
            folder=folder,
            output=_output(stage.command, options),
            content={"words": list(words)},
        )
    from trainer.parsing import parse_recipe

    if not any(word.split("=")[0] == "--output_dir" for word in words):
        words = (*words, f"--output_dir={folder}")
    recipe = parse_recipe(words)
    if recipe.run.resume not in ("", "auto"):
        raise InputError("resume: a stage goes on by itself where it was; drop it")
    run = Path(recipe.run.output_dir)
    return Ready(stage=stage, words=words, folder=run, output=run, content=_content(recipe))


def _content(recipe: Recipe) -> dict[str, Any]:
    # Through JSON, as it will be compared: a tuple comes back as a list.
    kept = {name: value for name, value in recipe.flat().items() if name not in _LABOUR}
    return dict(json.loads(json.dumps(kept)))


def recipe_content(path: Path) -> dict[str, Any]:
    """Read what defines a run from the recipe it stored."""
    from trainer.parsing import load_recipe

    return _content(load_recipe(path))


def _parse(command: str, words: Sequence[str]) -> Any:
    """Parse a command line by the parser of the command itself."""
    module = importlib.import_module(_PARALLEL.get(command, f"launch.{command}"))
    return module.parse_options(list(words))


def absolute_words(ready: Ready) -> tuple[str, ...]:
    """Make the paths in a command line mean the same in any folder."""
    found = vars(_parse(ready.stage.command, ready.words))
    values = [one for value in found.values() for one in (value if isinstance(value, list) else [value])]
    paths = {str(value) for value in values if isinstance(value, Path)}
    texts = [value for name in _TEXT_PATHS if isinstance(value := found.get(name), str)]
    paths |= {text for text in texts if text and "://" not in text}

    def absolute(word: str) -> str:
        return str(Path(word).expanduser().absolute()) if word in paths else word

    made = []
    for word in ready.words:
        name, equals, value = word.partition("=")
        made.append(f"{name}={absolute(value)}" if word.startswith("--") and equals else absolute(word))
    return tuple(made)


def _output(command: str, options: Any) -> Path | None:
    """Return the folder that a command leaves behind."""
    if command in ("synth", "pack"):
        return Path(options.out)
    if command not in ("evaluate", "extract", "export"):
        return None
    given: Path | None = options.output_dir if command == "evaluate" else options.output
    checkpoint: Path = options.checkpoint
    run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
    if command == "evaluate":
        return given or run / "evaluation"
    return given or (run / "soft_targets" / options.split if command == "extract" else run / "export" / options.format)


def _shared_folders(definition: Definition, ready: Sequence[Ready]) -> list[str]:
    """Refuse what two stages would write over each other."""
    problems = []
    owners: dict[tuple[str, Path], Ready] = {}
    for one in ready:
        keys = [("job", one.folder)]
        if one.output is not None:
            # Evaluations of two splits share a folder.
            split = next((w.partition("=")[2] for w in one.words if w.startswith("--split=")), "")
            keys.append((f"{one.stage.command} {split}" if one.stage.command == "evaluate" else "output", one.output))
        for kind, folder in keys:
            other = owners.setdefault((kind, folder.absolute()), one)
            if other is not one:
                problems.append(
                    f"{definition.file}:{one.stage.line}: stage {one.name}: writes to {folder}, as stage {other.name} "
                    "does; give one of them another folder"
                )
    return problems


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, weighty_only: bool = False) -> list[str]:
    """List what differs between two contents; `weighty_only`: what a run cannot go on with."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key) and not (weighty_only and key in FREE_ON_RESUME):
            found.append(f"{key} {_short(before.get(key))} -> {_short(now.get(key))}")
    return found


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
