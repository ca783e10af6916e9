"""Which stages are to be run and which are done already. Nothing is ever deleted or done over unasked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.pipeline.definition import Definition
from launch.pipeline.reading import nearest
from launch.pipeline.record import StageRecord, read_given
from launch.pipeline.resolving import Ready, changes, recipe_content
from trainer.errors import InputError, name_some

_COSTLY = ("train", "extract", "evaluate", "synth", "pack")
"""Commands that are done again only where what they refer to was; all others also where any stage before them was."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to become of a stage."""

    ready: Ready
    run: bool
    why: str
    """For people, e.g. "done"."""


def decide(definition: Definition, stages: Sequence[Ready], start: str | None = None) -> tuple[Decision, ...]:
    """Decide about every stage.

    `start` names a stage that is done again with all that comes after it, and before which all has to be done. Raises
    `InputError` for each stage that is done by another definition, or that would train over a finished run.
    """
    names = [ready.name for ready in stages]
    if start is not None and start not in names:
        raise InputError(f"--from {start}: {definition.file} has no stage of that name; {nearest(start, names)}")
    again = _descendants(stages, start) if start is not None else set()
    problems: list[str] = []
    decisions: dict[str, Decision] = {}
    by_name = {ready.name: ready for ready in stages}
    for ready in stages:
        where = f"{definition.file}:{ready.stage.line}: stage {ready.name}"
        try:
            found = _decide(ready, by_name, decisions, again=ready.name in again)
        except InputError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
            found = Decision(ready=ready, run=False, why="refused")
        if start is not None and found.run and ready.name not in again and _is_before(by_name, ready.name, start):
            problems.append(f"{where}: is not done, so that --from {start} has nothing to start from; leave --from out")
        decisions[ready.name] = found
    if problems:
        raise InputError(problems)
    return tuple(decisions.values())


def _decide(ready: Ready, by_name: dict[str, Ready], decisions: dict[str, Decision], *, again: bool) -> Decision:
    word = ready.job.last_word()
    is_done = word is not None and word.word == "DONE" and word.code == 0
    before = _content_before(ready)
    is_training = ready.stage.command == "train"
    if is_training and before is not None:
        weighty = changes(before, ready.content, weighty_only=True)
        if weighty and (ready.folder / "checkpoints").is_dir():
            raise InputError(
                f"{ready.folder} holds a run of another recipe ({name_some(weighty, 3)}); name another output_dir, or "
                f"move that run away: mv {ready.folder} {ready.folder}-old"
            )
    if not is_done:
        reason = "" if word is None else f": {word.reason}"
        return Decision(ready=ready, run=True, why=f"goes on{reason}" if word or ready.job.history() else "new")
    if again and is_training:
        raise InputError(
            f"{ready.folder} is trained to its end; to train it again move it away: mv {ready.folder} "
            f"{ready.folder}-old"
        )
    if again:
        return Decision(ready=ready, run=True, why="again, as --from says")
    changed = [] if before is None else changes(before, ready.content)
    if changed and is_training:
        return Decision(ready=ready, run=True, why=f"goes on with {name_some(changed, 3)}")
    if changed:
        raise InputError(
            f"is done by another definition ({name_some(changed, 3)}); take it back, or do the stage again: "
            f"--from {ready.name}"
        )
    if before is None:
        return Decision(ready=ready, run=True, why="done, but not known by which definition: again")
    stale = _outdated(ready, by_name, decisions)
    if stale and is_training:
        raise InputError(
            f"{ready.folder} was trained from an earlier {name_some(stale)}; move it away to train it again: "
            f"mv {ready.folder} {ready.folder}-old"
        )
    if stale:
        return Decision(ready=ready, run=True, why=f"again, since {name_some(stale)} changed")
    return Decision(ready=ready, run=False, why="done")


def _content_before(ready: Ready) -> dict[str, Any] | None:
    """Read by what definition the stage was begun; a run that no pipeline began tells by its recipe."""
    record = StageRecord.load(ready.job)
    if record is not None:
        return record.content
    recipe = ready.folder / "recipe.yaml"
    if ready.stage.command != "train" or not recipe.is_file():
        return None
    found = recipe_content(recipe)
    # Paths were written by whoever launched it, relative or absolute, and mean the same.
    paths = {name: value for name, value in ready.content.items() if _same_path(found.get(name), value)}
    return found | paths


def _same_path(one: Any, other: Any) -> bool:
    if not (isinstance(one, str) and isinstance(other, str) and one and other and "/" in one + other):
        return False
    return Path(one).absolute() == Path(other).absolute()


def _outdated(ready: Ready, by_name: dict[str, Ready], decisions: dict[str, Decision]) -> list[str]:
    """List the stages whose output is no longer what this stage worked from."""
    given = read_given(ready.job)
    referred = {name for name, _ in ready.stage.references}
    relevant = referred if ready.stage.command in _COSTLY else set(ready.stage.after)
    found = []
    for name in ready.stage.after:
        if name not in relevant:
            continue
        if decisions[name].run or (given is not None and given.get(name) != by_name[name].identity()):
            found.append(name)
    return found


def _descendants(stages: Sequence[Ready], start: str) -> set[str]:
    found = {start}
    for ready in stages:
        if found & set(ready.stage.after):
            found.add(ready.name)
    return found


def _is_before(by_name: dict[str, Ready], name: str, other: str) -> bool:
    """Whether a stage has to be done before another."""
    after = by_name[other].stage.after
    return name in after or any(_is_before(by_name, name, one) for one in after)
