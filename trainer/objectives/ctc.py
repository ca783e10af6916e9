"""Connectionist temporal classification (Graves et al. 2006) as a weighted sum over clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


class LabelsLike(Protocol):
    """Classes of B clips end to end `[S]`, lengths `[B]` on the host, weights `[B]`."""

    @property
    def classes(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...


def float32_log_probs(logits: Tensor) -> Tensor:
    """Normalise logits `[M, V]` in float32, whatever autocast or the backend made of them."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float().log_softmax(dim=-1)


def ctc_losses(log_probs: Tensor, output_lengths: Sequence[int], labels: LabelsLike) -> Tensor:
    """Return the CTC loss of each clip in nats, `[B]`; `log_probs` `[M, V]` float32, clip after clip."""
    device = log_probs.device
    if log_probs.is_cuda and torch.are_deterministic_algorithms_enabled():
        # The CUDA kernel sums its gradient with atomics; the CPU's is exact to repeat.
        log_probs = log_probs.cpu()
    padded = pad_sequence(list(log_probs.split(list(output_lengths))))
    lengths = torch.tensor(output_lengths, dtype=torch.int64)
    losses = F.ctc_loss(padded, labels.classes.to(padded.device), lengths, labels.lengths, blank=0, reduction="none")
    return losses.to(device)


def uniform_divergences(log_probs: Tensor, output_lengths: Sequence[int]) -> Tensor:
    """Return the sum over each clip's frames of KL(model || uniform) in nats, `[B]`."""
    per_frame = (log_probs.exp() * log_probs).sum(dim=-1) + math.log(log_probs.shape[-1])
    return torch.stack([part.sum() for part in per_frame.split(list(output_lengths))])


def ctc_objective(
    logits: Tensor,
    output_lengths: Sequence[int],
    labels: LabelsLike,
    partner_labels: LabelsLike | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the weighted loss sum of a micro-batch, a float32 scalar; its denominator belongs to the global batch.

    Mixup adds the loss against the partner's glosses with the partner's weight. Label smoothing is the CTC form of Kim
    et al. 2018: (1 - e) CTC + e times the sum over valid frames of KL(model || uniform).
    """
    log_probs = float32_log_probs(logits)
    total = (labels.weights * ctc_losses(log_probs, output_lengths, labels)).sum()
    weights = labels.weights
    if partner_labels is not None:
        total = total + (partner_labels.weights * ctc_losses(log_probs, output_lengths, partner_labels)).sum()
        weights = weights + partner_labels.weights
    if label_smoothing:
        divergence = (weights * uniform_divergences(log_probs, output_lengths)).sum()
        total = (1.0 - label_smoothing) * total + label_smoothing * divergence
    return total
