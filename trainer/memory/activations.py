"""What the passes of a recipe's model take, counted on this machine for any other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainer.engine.engine import checkpoint_activations
from trainer.engine.precision import PreciseModel
from trainer.loss import StepLoss
from trainer.memory.cells import load_of, loss_of, random_cell
from trainer.memory.counting import AllocationCounter, SavedBytes
from trainer.memory.model import MemoryModel, fit
from trainer.memory.static import ModelSize
from trainer.memory.teacher import make_up_teacher
from trainer.models.auxiliary import AUXILIARY
from trainer.models.build import build_model
from trainer.recipe import VIDEO_MODELS, Recipe

_CELLS = ((8,), (48,), (24, 24), (32, 4, 4, 4))
"""Clips of the counted cells in output frames: enough to tell slots, padding and what is fixed apart."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a model is and what its passes take beyond weights and gradients."""

    size: ModelSize
    passes: MemoryModel
    saved_per_slot: float
    """Of that, what autograd keeps from forward to backward, per slot of the longest counted cell."""


def measure_size(model: nn.Module) -> ModelSize:
    """Count the weights of a model that has `blocks()`."""
    blocks: list[nn.Module] = model.blocks()  # type: ignore[operator]
    return ModelSize(
        total=sum(p.numel() for p in model.parameters()),
        largest_block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        largest_weight=max(p.numel() for p in model.parameters()),
        auxiliary=sum(p.numel() for name, p in model.named_parameters() if name.startswith(AUXILIARY)),
    )


def size_of(recipe: Recipe, *, feature_dim: int, num_classes: int) -> ModelSize:
    """Count the weights of a recipe's model without making them, those that training alone needs among them."""
    with torch.device("meta"):
        teacher = make_up_teacher(recipe, feature_dim=feature_dim, num_classes=num_classes, device=torch.device("meta"))
        model = build_model(recipe.model, feature_dim=feature_dim, num_classes=num_classes)
        StepLoss(objective=recipe.objective, distillation=teacher).equip(model)
        return measure_size(model)


def count_activations(recipe: Recipe, *, feature_dim: int, num_classes: int, checkpointing: bool) -> Counted:
    """Run small cells through the recipe's model at its full width on the CPU, and count what lives in between.

    A teacher is asked first, as in a step: its activations have gone when the student's come, its distributions stay.
    """
    cpu = torch.device("cpu")
    teacher = make_up_teacher(recipe, feature_dim=feature_dim, num_classes=num_classes, device=cpu)
    model = build_model(recipe.model, feature_dim=feature_dim, num_classes=num_classes)
    StepLoss(objective=recipe.objective, distillation=teacher).equip(model)
    wrapped = PreciseModel(model, recipe.run.mixed_precision, cpu)
    if checkpointing:
        checkpoint_activations(wrapped.blocks())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stride, crop = recipe.model.total_stride, recipe.corpus.frame_crop
    frame_shape = (crop, crop, 3) if recipe.model.model in VIDEO_MODELS else ()
    loads, peaks, saved = [], [], 0.0
    for clips in _CELLS:
        num_frames = np.array(clips, dtype=np.int64) * stride
        cell = random_cell(
            num_frames,
            total_stride=stride,
            feature_dim=feature_dim,
            num_classes=num_classes,
            device=cpu,
            mixed=recipe.objective.mixup_alpha > 0,
            frame_shape=frame_shape,
        )
        existing: list[Tensor] = [*cell.tensors(), *model.parameters(), *model.buffers()]
        kept = SavedBytes(*existing)
        with AllocationCounter(*existing, *(p.grad for p in model.parameters() if p.grad is not None)) as counter:
            targets = teacher.targets(cell, made_up=True)
            with kept:
                loss = loss_of(wrapped(cell.features, cell.layout), cell, recipe.objective, teacher, targets)
            loss.backward()
            del loss, targets
        loads.append(load_of(num_frames, stride))
        # The features are there as long as the pass.
        peaks.append(counter.peak + float(cell.features.nbytes))
        saved = max(saved, kept.total / loads[-1].slots)
    return Counted(size=measure_size(model), passes=fit(loads, peaks), saved_per_slot=saved)


def read_ahead(
    feature_dim: int, *, num_workers: int, on_cuda: bool, itemsize: int = 4, stored: int | None = None
) -> float:
    """Return the bytes per slot of the cells that the loader (`CellLoader`) holds beside the one in use.

    On a CPU every buffer but one, the update's included; on a GPU the next cell as it is computed on, and the one after
    it twice as it is stored. `itemsize`: bytes of a value that is computed on, 1 for frames; `stored`: of one that is
    stored, the same where nobody says, as a table of lengths does not.
    """
    if on_cuda:
        return feature_dim * float(itemsize + 2 * (itemsize if stored is None else stored))
    return feature_dim * float(itemsize) * max(2, 2 * num_workers + 1)
