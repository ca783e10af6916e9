"""What the next attempt at a run would begin from, every byte of its checkpoints compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from trainer.assembly import with_absolute_paths
from trainer.checkpoint.content import RunState, read_checkpoint
from trainer.checkpoint.store import CheckpointStore, find_checkpoint
from trainer.data.normalization import Normalization
from trainer.doctor.finding import Finding
from trainer.errors import InputError
from trainer.job.plain import check_not_launched
from trainer.recipe import Recipe
from trainer.run_directory import RECIPE, check_same_recipe, claim

CHECK = "resume state"


@dataclasses.dataclass(kw_only=True)
class Start:
    """What a run would begin from; what the corpus is compared with."""

    normalization: Normalization | None = None
    state: RunState | None = None
    """None: from the beginning."""


def check_resume(recipe: Recipe, start: Start) -> Iterator[Finding]:
    """Say what `--resume auto`, which launched jobs are given, would do; fill `start` in."""
    recipe = with_absolute_paths(recipe)
    folder = Path(recipe.run.output_dir)
    named = recipe.run.resume not in ("", "auto")
    claimed = recipe if named else dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, resume="auto"))
    existed = claim(claimed)
    yield from _check_owner(folder)
    said: list[str] = []
    path: Path | None
    if named:
        path = find_checkpoint(Path(recipe.run.resume), prefer="last")
    else:
        path = CheckpointStore(folder, keep=recipe.run.keep_checkpoints).newest_sound(said.append)
    for line in said:
        yield Finding(
            check=CHECK,
            value=line.removeprefix("warning: "),
            verdict="warn",
            mend="see that the disk is sound and has room; the damaged checkpoint may be deleted",
        )
    if path is None:
        yield from _check_beginning(recipe, folder, start, existed=existed, damaged=len(said))
        return
    checkpoint = read_checkpoint(path, with_optimizer=False)
    check_same_recipe(checkpoint.recipe, recipe, str(path))
    start.normalization, start.state = checkpoint.normalization, checkpoint.state
    how = "" if recipe.run.resume else ", with --resume auto (signscale launch adds it)"
    yield Finding(
        check=CHECK,
        value=f"goes on from step {checkpoint.state.step} (epoch {checkpoint.state.epoch}), {path.name}{how}",
    )


def _check_beginning(recipe: Recipe, folder: Path, start: Start, *, existed: bool, damaged: int) -> Iterator[Finding]:
    if damaged:
        yield Finding(
            check=CHECK,
            value=f"{folder}: none of {damaged} checkpoint(s) is sound, training starts from the beginning",
            verdict="FAIL",
            mend=f"restore {folder / 'checkpoints'} from a copy, or delete the run to start anew",
        )
        return
    value = f"{folder} holds {RECIPE} and no checkpoint" if existed else f"{folder} is new"
    if recipe.run.init_from and not Path(recipe.run.init_from).is_file():
        path = find_checkpoint(Path(recipe.run.init_from))
        start.normalization = read_checkpoint(path, with_optimizer=False).normalization
        value += f"; weights from {path}"
    yield Finding(check=CHECK, value=f"{value}: starts from the beginning")


def _check_owner(folder: Path) -> Iterator[Finding]:
    """Say whether an attempt works on the run already, which would refuse another one."""
    try:
        check_not_launched(folder)
    except InputError as error:
        value, _, mend = str(error).partition("; ")
        yield Finding(check=CHECK, value=value, verdict="FAIL", mend=mend)
