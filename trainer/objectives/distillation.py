"""Distillation (Hinton et al. 2015) over the output frames of a CTC model: sums over frames, never means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]


def soften(log_probs: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities `[M, V]` at a temperature, in float32; logits will do as well."""
    with torch.autocast(log_probs.device.type, enabled=False):
        return (log_probs.float() / temperature).log_softmax(dim=-1)


def align_frames(log_probs: Tensor, input_lengths: Sequence[int], *, stride: int, to_stride: int) -> Tensor:
    """Bring log-probabilities of output frames of `stride` to frames of `to_stride`, clip after clip, `[M, V]`.

    A frame of the target lies over input frames `[j * to_stride, (j + 1) * to_stride)`. Of finer frames it takes the
    mean of the distributions that lie in there (for the student the same as the mean of the divergences from each of
    them, but for a constant); of coarser ones the one that it lies in itself. One stride must divide the other.
    """
    if stride == to_stride:
        return log_probs
    lengths = np.asarray(input_lengths, dtype=np.int64)
    theirs, ours = -(-lengths // stride), -(-lengths // to_stride)
    if stride > to_stride:
        # Rounding up twice is rounding up once: the last frame of the target has a coarser one to lie in.
        index = np.repeat(np.cumsum(theirs) - theirs, ours) + _within(ours) // (stride // to_stride)
        return log_probs.index_select(0, torch.from_numpy(index).to(log_probs.device))
    ratio = to_stride // stride
    places = np.repeat((np.cumsum(ours) - ours) * ratio, theirs) + _within(theirs)
    counts = np.minimum(ratio, np.repeat(theirs, ours) - ratio * _within(ours)).astype(np.float32)
    table = log_probs.new_full((int(ours.sum()) * ratio, log_probs.shape[1]), -torch.inf)
    table = table.index_copy(0, torch.from_numpy(places).to(log_probs.device), log_probs)
    sums = table.view(-1, ratio, log_probs.shape[1]).logsumexp(dim=1)
    return sums - torch.from_numpy(np.log(counts)).to(log_probs.device)[:, None]


def divergence_sum(logits: Tensor, targets: Tensor, *, temperature: float, blank_weight: float = 1.0) -> Tensor:
    """Return the sum over frames of KL(teacher || student) in nats, a float32 scalar; both are softened alike.

    `logits` `[M, V]` of the student; `targets` `[M, V]`: the teacher's log-probabilities at the temperature already.
    Frames whose likeliest target is the blank count `blank_weight`.
    """
    per_frame = (targets.exp() * (targets - soften(logits, temperature))).sum(dim=-1)
    if blank_weight != 1.0:
        is_blank = targets.argmax(dim=-1) == 0
        per_frame = torch.where(is_blank, per_frame * blank_weight, per_frame)
    return per_frame.sum()


def _within(lengths: Indices) -> Indices:
    """Count 0 … length - 1 for each length, all in one array."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
