"""A micro-batch: what one forward and backward pass is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.layout import TimeLayout

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Classes of B clips, concatenated `[S]`, their `lengths` `[B]` (on the host), and each clip's weight `[B]`."""

    classes: Tensor
    lengths: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Labels:
        """Copy to the device, without waiting."""
        return replace(
            self,
            classes=self.classes.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One cell: features `[N, D]` of its clips, end to end, with their labels; `clips` index the split."""

    features: Tensor
    layout: TimeLayout
    labels: Labels
    partner_labels: Labels | None
    clips: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to the device, without waiting."""
        return replace(
            self,
            features=self.features.to(device, non_blocking=True),
            layout=self.layout.to(device),
            labels=self.labels.to(device),
            partner_labels=None if self.partner_labels is None else self.partner_labels.to(device),
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors that `to` moves."""
        labels = [self.labels, *([] if self.partner_labels is None else [self.partner_labels])]
        moved = [tensor for part in labels for tensor in (part.classes, part.weights)]
        return [self.features, *moved, *self.layout.tensors()]


def without_features(
    layout: TimeLayout, labels: Labels, partner_labels: Labels | None, clips: tuple[int, ...]
) -> MicroBatch:
    """Make the part of a micro-batch that is known before a feature is read."""
    return MicroBatch(features=torch.empty(0), layout=layout, labels=labels, partner_labels=partner_labels, clips=clips)


def make_labels(classes: Sequence[Indices], weights: npt.NDArray[np.float64]) -> Labels:
    """Pack the classes of several clips."""
    return Labels(
        classes=torch.from_numpy(np.concatenate(classes)),
        lengths=torch.tensor([len(part) for part in classes], dtype=torch.int64),
        weights=torch.from_numpy(weights.astype(np.float32)),
    )
