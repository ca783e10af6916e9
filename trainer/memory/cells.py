"""Cells made up for measuring: random features of the right shape, random glosses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.batch import MicroBatch, make_labels
from trainer.distillation import Distillation, Targets, Undistilled
from trainer.engine import Engine
from trainer.layout import lay_out, slot_frames
from trainer.loss import StepLoss
from trainer.memory.model import Load
from trainer.models.temporal_head import Outputs
from trainer.recipe import ObjectiveRecipe

Indices = npt.NDArray[np.int64]


def load_of(num_frames: Indices, total_stride: int) -> Load:
    """Say what a cell of these clips holds."""
    outputs = -(-num_frames // total_stride)
    return Load(slots=int(slot_frames(num_frames, total_stride).sum()), padded=int(len(outputs) * outputs.max()))


def random_cell(
    num_frames: Indices,
    *,
    total_stride: int,
    feature_dim: int,
    num_classes: int,
    device: torch.device,
    num_glosses: Indices | None = None,
    mixed: bool = False,
    frame_shape: tuple[int, ...] = (),
) -> MicroBatch:
    """Make a cell of clips of `num_frames` `[n]`; `mixed`: each with another's glosses too, as mixup has it.

    `num_glosses` `[n]`: by default one for every three output frames. `frame_shape`: that of video's frames, uint8;
    empty for features.
    """
    draws = np.random.default_rng(len(num_frames))
    outputs = -(-num_frames // total_stride)
    counts = np.maximum(1, outputs // 3 if num_glosses is None else num_glosses)
    # Neighbours differ wherever there are two glosses to choose from, so that CTC needs no frame between them.
    starts = draws.integers(0, max(1, num_classes - 1), len(counts))
    classes = [
        (start + np.arange(count)) % max(1, num_classes - 1) + 1 for start, count in zip(starts, counts, strict=True)
    ]
    labels = make_labels(classes, np.ones(len(counts)))
    # The seeds of dropout switch it on.
    keys = np.arange(len(num_frames), dtype=np.uint64)
    batch = MicroBatch(
        features=torch.empty(0),
        layout=lay_out(num_frames, total_stride, keys),
        labels=labels,
        partner_labels=labels if mixed else None,
        clips=tuple(range(len(num_frames))),
    ).to(device)
    rows = int(num_frames.sum())
    if frame_shape:
        features = torch.empty(rows, *frame_shape, dtype=torch.uint8, device=device).random_()
    else:
        features = torch.empty(rows, feature_dim, device=device).normal_()
    return MicroBatch(**{**vars(batch), "features": features})


def run_pass(
    engine: Engine,
    cell: MicroBatch,
    objective: ObjectiveRecipe,
    *,
    is_last: bool = False,
    distillation: Distillation | Undistilled | None = None,
) -> None:
    """Go forward and backward over a cell, as a step does."""
    teacher = distillation or Undistilled()
    targets = teacher.targets(cell, made_up=True)
    outputs = engine.forward(cell.features, cell.layout)
    engine.backward(loss_of(outputs, cell, objective, teacher, targets), 1.0, is_last=is_last)


def loss_of(
    outputs: Outputs,
    cell: MicroBatch,
    objective: ObjectiveRecipe,
    teacher: Distillation | Undistilled | None = None,
    targets: Targets | None = None,
) -> Tensor:
    """Return the loss sum of a cell."""
    loss = StepLoss(objective=objective, distillation=teacher or Undistilled())
    return loss(outputs, cell, targets, per_frame=1.0).total
