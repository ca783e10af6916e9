"""The time axis of a micro-batch: clips laid end to end, with a guard of silence between them.

No clip is padded to its neighbour's length. Frames travel dense, `[N, D]` with N the sum of all frames; the
temporal network sees one long axis on which every clip has a slot that starts at a multiple of the total stride and
ends in at least three zero frames. A kernel that reaches over a clip's edge meets zeros, exactly as it does
when the clip is alone. Data and models share this module, and nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.randomness import UInt64s, mix

Indices = npt.NDArray[np.int64]


def slot_frames(num_frames: Indices, total_stride: int) -> Indices:
    """Count the frames that each clip takes on the model's time axis, `[n]` to `[n]`.

    A slot is the clip rounded up to whole output frames plus the guard of silence (at least three frames, the reach
    of the widest kernel) that keeps neighbours apart.
    """
    guard = -(-3 // total_stride)
    return (-(-num_frames // total_stride) + guard) * total_stride


@dataclass(frozen=True, kw_only=True)
class TimeLayout:
    """Where the B clips of a micro-batch lie; N input frames, M output frames, L time positions.

    `input_lengths`, `output_lengths`: frames and output frames of each clip, on the host. `frame_positions` `[N]`: time
    position of each dense frame. `masks`: per temporal stride, `[L / stride, 1]`, one on clips and zero in guards.
    `rnn_positions` `[M]`: the output positions in the order of a packed sequence (time first, longest clip first);
    `rnn_batch_sizes` stays on the host. `dense_order` `[M]` brings that order back to clip after clip. `row_seeds`
    `[M]`: one int32 per output frame, in packed order, that dropout is drawn from; None in evaluation.
    """

    input_lengths: tuple[int, ...]
    output_lengths: tuple[int, ...]
    length: int
    frame_positions: Tensor
    masks: dict[int, Tensor]
    rnn_positions: Tensor
    rnn_batch_sizes: Tensor
    dense_order: Tensor
    row_seeds: Tensor | None

    def to(self, device: torch.device) -> TimeLayout:
        """Copy all index tensors to the device, without waiting."""
        return dataclasses.replace(
            self,
            frame_positions=self.frame_positions.to(device, non_blocking=True),
            masks={stride: mask.to(device, non_blocking=True) for stride, mask in self.masks.items()},
            rnn_positions=self.rnn_positions.to(device, non_blocking=True),
            dense_order=self.dense_order.to(device, non_blocking=True),
            row_seeds=None if self.row_seeds is None else self.row_seeds.to(device, non_blocking=True),
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors that `to` moves."""
        seeds = [] if self.row_seeds is None else [self.row_seeds]
        return [self.frame_positions, *self.masks.values(), self.rnn_positions, self.dense_order, *seeds]


def lay_out(num_frames: Indices, total_stride: int, keys: UInt64s | None = None) -> TimeLayout:
    """Lay clips of `num_frames` `[B]` (each at least 1) on one time axis; `keys` `[B]` seed dropout."""
    slots = slot_frames(num_frames, total_stride)
    starts = np.cumsum(slots) - slots
    outputs = -(-num_frames // total_stride)
    strides = {1, 2, total_stride} if total_stride > 1 else {1}
    masks = {stride: _mask(starts, -(-num_frames // stride), int(slots.sum()), stride) for stride in strides}
    # Packed order: frame 0 of every clip, longest first, then frame 1 of those that have one, …
    longest_first = np.argsort(-outputs, kind="stable")
    times = _within(outputs[longest_first])
    clips = np.repeat(longest_first, outputs[longest_first])
    packed = np.lexsort((np.argsort(longest_first, kind="stable")[clips], times))
    times, clips = times[packed], clips[packed]
    dense = (np.cumsum(outputs) - outputs)[clips] + times
    dense_order = np.empty_like(dense)
    dense_order[dense] = np.arange(len(dense))
    seeds = None
    if keys is not None:
        with np.errstate(over="ignore"):
            seeds = mix(keys[clips] + times.astype(np.uint64)).astype(np.uint32).view(np.int32)
    return TimeLayout(
        input_lengths=tuple(int(n) for n in num_frames),
        output_lengths=tuple(int(n) for n in outputs),
        length=int(slots.sum()),
        frame_positions=torch.from_numpy(np.repeat(starts, num_frames) + _within(num_frames)),
        masks=masks,
        rnn_positions=torch.from_numpy(starts[clips] // total_stride + times),
        rnn_batch_sizes=torch.from_numpy(np.bincount(times)),
        dense_order=torch.from_numpy(dense_order),
        row_seeds=None if seeds is None else torch.from_numpy(seeds),
    )


def _within(lengths: Indices) -> Indices:
    """Count 0 … length - 1 for each length, all in one array."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)


def _mask(starts: Indices, lengths: Indices, length: int, stride: int) -> Tensor:
    mask = np.zeros((length // stride, 1), dtype=np.float32)
    for start, size in zip((starts // stride).tolist(), lengths.tolist(), strict=True):
        mask[start : start + size] = 1.0
    return torch.from_numpy(mask)
