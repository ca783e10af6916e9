"""Distillation (Hinton et al. 2015) over the output frames of a CTC model: sums over frames, never means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

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
    if stride >= to_stride:
        return _repeat_frames(log_probs, input_lengths, stride=stride, to_stride=to_stride)
    table, counts = _group_frames(log_probs, input_lengths, stride=stride, to_stride=to_stride, filler=-torch.inf)
    return table.logsumexp(dim=1) - counts.log()


def align_features(features: Tensor, input_lengths: Sequence[int], *, stride: int, to_stride: int) -> Tensor:
    """Bring features `[M, C]` to frames of another stride as `align_frames` does; of finer ones their mean."""
    if stride >= to_stride:
        return _repeat_frames(features, input_lengths, stride=stride, to_stride=to_stride)
    table, counts = _group_frames(features, input_lengths, stride=stride, to_stride=to_stride, filler=0.0)
    return table.sum(dim=1) / counts


def _repeat_frames(values: Tensor, input_lengths: Sequence[int], *, stride: int, to_stride: int) -> Tensor:
    """Give each frame of `to_stride` the values of the frame of `stride`, as fine or coarser, that it lies in."""
    if stride == to_stride:
        return values
    theirs, ours = _count(input_lengths, stride), _count(input_lengths, to_stride)
    # Rounding up twice is rounding up once: the last frame of the target has a coarser one to lie in.
    index = np.repeat(np.cumsum(theirs) - theirs, ours) + _within(ours) // (stride // to_stride)
    return values.index_select(0, torch.from_numpy(index).to(values.device))


def _group_frames(
    values: Tensor, input_lengths: Sequence[int], *, stride: int, to_stride: int, filler: float
) -> tuple[Tensor, Tensor]:
    """Collect the finer frames in each frame of `to_stride`, `[M, ratio, C]`, and count them, `[M, 1]`."""
    theirs, ours, ratio = _count(input_lengths, stride), _count(input_lengths, to_stride), to_stride // stride
    places = np.repeat((np.cumsum(ours) - ours) * ratio, theirs) + _within(theirs)
    counts = np.minimum(ratio, np.repeat(theirs, ours) - ratio * _within(ours)).astype(np.float32)
    table = values.new_full((int(ours.sum()) * ratio, values.shape[1]), filler)
    table = table.index_copy(0, torch.from_numpy(places).to(values.device), values)
    return table.view(-1, ratio, values.shape[1]), torch.from_numpy(counts).to(values.device)[:, None]


def _count(input_lengths: Sequence[int], stride: int) -> Indices:
    return -(-np.asarray(input_lengths, dtype=np.int64) // stride)


def divergence_sum(logits: Tensor, targets: Tensor, *, temperature: float, blank_weight: float = 1.0) -> Tensor:
    """Return the sum over frames of KL(teacher || student) in nats, a float32 scalar; both are softened alike.

    `logits` `[M, V]` of the student; `targets` `[M, V]`: the teacher's log-probabilities at the temperature already.
    Frames whose likeliest target is the blank count `blank_weight`.
    """
    per_frame = (targets.exp() * (targets - soften(logits, temperature))).sum(dim=-1)
    return _weigh_blanks(per_frame, targets, blank_weight).sum()


def distance_sum(features: Tensor, theirs: Tensor, targets: Tensor, *, blank_weight: float = 1.0) -> Tensor:
    """Return the sum over frames of 1 - cos(student, teacher), a float32 scalar; `features` and `theirs` `[M, C]`.

    `targets` `[M, V]` tell the blank frames, as in `divergence_sum`.
    """
    with torch.autocast(features.device.type, enabled=False):
        per_frame = 1.0 - F.cosine_similarity(features.float(), theirs.float(), dim=-1)
    return _weigh_blanks(per_frame, targets, blank_weight).sum()


def _weigh_blanks(per_frame: Tensor, targets: Tensor, blank_weight: float) -> Tensor:
    if blank_weight == 1.0:
        return per_frame
    is_blank = targets.argmax(dim=-1) == 0
    return torch.where(is_blank, per_frame * blank_weight, per_frame)


def _within(lengths: Indices) -> Indices:
    """Count 0 … length - 1 for each length, all in one array."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
