"""A trained checkpoint, opened on every rank for a command that uses it: evaluation, extraction."""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.content import Checkpoint, read_checkpoint
from trainer.checkpoint.store import find_checkpoint
from trainer.engine import Processes
from trainer.engine.replicated import ReplicatedEngine
from trainer.errors import InputError
from trainer.observe.progress import Progress
from trainer.recipe import CorpusRecipe


@dataclass(frozen=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint and what to use it with."""

    folder: Path
    checkpoint: Checkpoint
    engine: ReplicatedEngine
    """Whatever backend trained it: each rank uses the whole model."""
    progress: Progress


def open_checkpoint(path: Path, stack: ExitStack, **changes: Any) -> OpenCheckpoint:
    """Join the ranks and read the checkpoint that a user means, the same on all; `stack` closes what is opened.

    `changes`: what differs from the options that the run was trained with. Raises `InputError` if there is none, or if
    it is damaged.
    """
    folder = find_checkpoint(path)
    checkpoint = read_checkpoint(folder, with_optimizer=False)
    run = dataclasses.replace(checkpoint.recipe.run, **changes)
    engine = ReplicatedEngine(Processes(run), run)
    stack.callback(engine.close)
    if len(set(engine.gather_objects(str(folder)))) > 1:
        raise InputError(f"{path}: a run published a checkpoint just now; name one, e.g. {folder}")
    progress = Progress(enabled=engine.is_main)
    stack.callback(progress.close)
    return OpenCheckpoint(folder=folder, checkpoint=checkpoint, engine=engine, progress=progress)


def corpus_asked_for(checkpoint: Checkpoint, options: argparse.Namespace) -> CorpusRecipe:
    """Return the run's corpus, or the one that `--data_dir` and `--annotations` name."""
    corpus = checkpoint.recipe.corpus
    if options.data_dir:
        # Another corpus folder brings its own annotations along, unless the user says where they are.
        return dataclasses.replace(corpus, data_dir=options.data_dir, annotations=options.annotations or "")
    if options.annotations:
        return dataclasses.replace(corpus, annotations=options.annotations)
    return corpus
