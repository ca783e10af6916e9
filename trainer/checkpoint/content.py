"""What a checkpoint holds: everything that evaluation, fine-tuning and going on need, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.checkpoint.manifest import find_damage
from trainer.data.normalization import Normalization
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError
from trainer.files import write_json, write_text
from trainer.parsing import dump_recipe, load_recipe
from trainer.recipe import Recipe

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
RECIPE, VOCABULARY, NORMALIZATION = "recipe.yaml", "vocabulary.json", "normalization.safetensors"


@dataclass(kw_only=True)
class RunState:
    """Where a run stands; with the weights and the optimizer it is all that going on needs."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    epoch: int = 0
    """Epoch of the next step."""
    position: int = 0
    """Clips of that epoch already used."""
    drawn_size: int = 0
    """Clips of a global batch when that epoch began, which its order was drawn for."""
    best: float | None = None
    """Best value of the selection metric so far."""
    best_step: int | None = None
    """Step that reached it."""
    validations_since_best: int = 0
    """Validations without a better one."""
    skipped_steps: int = 0
    """Steps skipped because the gradient was not finite."""
    first_wer: float | None = None
    """Dev WER before training, in percent."""
    best_wer: float | None = None
    """Lowest dev WER so far, in percent."""
    last_validation: int = -1
    """Step of the last validation."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the metrics since the last line of the log."""
    num_clips: int = 0
    """Training clips."""
    clips_hash: str = ""
    """Which training clips the plan is made from."""
    files_hash: str = ""
    """Which files were read and checked."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """State of the dynamic loss scale; empty where the precision needs none."""
    world_size: int = 1
    """Ranks of the attempt that wrote this."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory."""

    recipe: Recipe
    vocabulary: Vocabulary
    normalization: Normalization
    state: RunState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write all files into an existing, empty folder."""
        save_file(self.model, folder / MODEL)
        save_file(self.optimizer, folder / OPTIMIZER)
        self.vocabulary.save(folder / VOCABULARY)
        self.normalization.save(folder / NORMALIZATION)
        write_text(folder / RECIPE, dump_recipe(self.recipe))
        write_json(folder / STATE, dataclasses.asdict(self.state))


def read_checkpoint(folder: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint after comparing every byte with its manifest.

    Raises `InputError` if a file is missing, cut short or changed.
    """
    damage = find_damage(folder)
    if damage:
        raise InputError(f"{damage}; the checkpoint is refused, use another one or --resume auto")
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return Checkpoint(
            recipe=load_recipe(folder / RECIPE),
            vocabulary=Vocabulary.load(folder / VOCABULARY),
            normalization=Normalization.load(folder / NORMALIZATION),
            state=RunState(**state),
            model=load_file(folder / MODEL),
            optimizer=load_file(folder / OPTIMIZER) if with_optimizer else {},
        )
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: was written by another version ({error}); use that version") from error
