"""Dropout whose mask is a pure function of (seed, epoch, clip, frame, channel).

The usual dropout draws from a generator in the order in which a rank happens to meet its clips, so that the same recipe
follows another curve on another number of ranks. Here the mask belongs to the clip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClipDropout(nn.Module):
    """Zero entries with probability `p` and scale the rest by 1 / (1 - p).

    `salt` tells the dropout layers of one model apart.
    """

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        self.p = p
        self.salt = salt

    def forward(self, x: Tensor, row_seeds: Tensor | None) -> Tensor:
        """Drop entries of `x` `[M, C]`; `row_seeds` `[M]` int32, or None to keep all (evaluation)."""
        if row_seeds is None or self.p == 0.0:
            return x
        columns = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        seeds = scramble(row_seeds + _as_int32(self.salt * 0x9E3779B9))[:, None]
        bits = scramble(seeds ^ scramble(columns)[None, :]) & 0x7FFFFFFF
        keep = bits >= int(self.p * 0x80000000)
        return x * (keep.to(x.dtype) * (1.0 / (1.0 - self.p)))


def scramble(x: Tensor) -> Tensor:
    """Mix the bits of int32 numbers (the `lowbias32` finaliser, C. Wellons 2018)."""
    # Torch shifts int32 arithmetically: the mask removes the copies of the sign bit.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _as_int32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _as_int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 0x100000000 if value >= 0x80000000 else value
