"""From stored values to the model's input: decoded, normalised, augmented, in one pass and without fresh memory.

The same operations run in the loader's threads and on a GPU. On a CPU they go block by block through the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.augment import NOISE_VALUES, ClipDraw, noise_table, positions
from trainer.data.normalization import Normalization, clip_statistics
from trainer.data.table import Storage
from trainer.data.video.view import View

Affine: TypeAlias = Callable[[Tensor, Tensor], object]
"""Maps a block of stored values into a block of rows, which may be the same memory."""

_SERIAL_VALUES = 1 << 15
"""Values of an operation that torch leaves to the calling thread: loader threads start no teams of their own."""
_CACHED_VALUES = 1 << 18
"""Values of a block where there are no teams anyway: the block stays in the cache from one operation to the next."""


@dataclass(frozen=True, kw_only=True)
class ClipContent:
    """How one clip's rows of a micro-batch's input come about.

    `stored` is the place of its values among the clips read for the cell, `draw` its augmentation (None: as it is),
    `start` and `num_frames` the rows it fills. A `partner` is resampled to them and mixed in with weight `1 - share`.
    Of a video, `view` says what is taken.
    """

    stored: int
    start: int
    num_frames: int
    draw: ClipDraw | None = None
    share: float = 1.0
    partner: ClipContent | None = None
    view: View | None = None


class FeatureTransform:
    """Turns stored clips `[T, D]` into rows of the model's input, float32."""

    def __init__(self, storage: Storage, normalization: Normalization, *, noise: float, device: torch.device) -> None:
        self.device = device
        self.dim = normalization.feature_dim
        self.in_place = storage.dtype == np.float32
        """Whether stored values may lie in the rows that they become."""
        self._storage, self._normalization, self._noise = storage, normalization, noise
        if noise:
            table = torch.from_numpy(noise_table(self.dim)).to(device)
            # Row i holds the `dim` values from the i-th on; a view, of 4 MB in all.
            self._noise_rows = table.as_strided((NOISE_VALUES, self.dim), (1, 1))
        self._affine = self._fixed_affine()

    def fill(
        self, out: Tensor, contents: Sequence[ClipContent], stored: Callable[[int, Tensor | None], Tensor]
    ) -> None:
        """Fill `out` `[N, D]` with the clips, in the order given.

        `stored(place, rows)` returns a clip's stored values `[T, D]`, valid until the next call; they may be put into
        `rows`, which are given where that saves a copy.
        """
        for content in contents:
            self._fill_clip(out[content.start : content.start + content.num_frames], content, stored)

    def _fill_clip(self, rows: Tensor, content: ClipContent, stored: Callable[[int, Tensor | None], Tensor]) -> None:
        direct = content.draw is None and self.in_place
        self.apply(stored(content.stored, rows if direct else None), rows, content.draw)
        if content.partner is None:
            return
        partner = rows.new_empty(content.partner.num_frames, self.dim)
        self._fill_clip(partner, content.partner, stored)
        before, after, share = (torch.from_numpy(part).to(self.device) for part in positions(len(partner), len(rows)))
        mixed = partner.index_select(0, before).lerp_(partner.index_select(0, after), share[:, None])
        rows.mul_(content.share).add_(mixed, alpha=1.0 - content.share)

    def apply(self, stored: Tensor, rows: Tensor, draw: ClipDraw | None) -> None:
        """Turn one clip's stored values `[T, D]` into `rows` `[n, D]`; they may be the same memory without a draw."""
        affine = self._affine if self._normalization.kind != "clip" else self._clip_affine(stored)
        moved = None
        if draw is not None:
            before, after, share = (torch.from_numpy(a).to(self.device) for a in (draw.before, draw.after, draw.share))
            moved = before, (after, share[:, None]) if draw.share.any() else None
        noise = None if draw is None or draw.noise is None else torch.from_numpy(draw.noise).to(self.device)
        step = self._rows_per_block(len(rows))
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            chosen = slice(start, start + step)
            source = stored[chosen] if moved is None else stored.index_select(0, moved[0][chosen])
            if moved is not None and moved[1] is not None:
                # The affine map may follow: it commutes with weights that add up to one.
                after, share = moved[1]
                source = source.float().lerp_(stored.index_select(0, after[chosen]).float(), share[chosen])
            affine(source, block)
            if noise is not None:
                block.add_(self._noise_rows.index_select(0, noise[chosen]), alpha=self._noise)
        if draw is not None:
            for first, last in draw.frame_spans:
                rows[first:last] = 0.0
            for first, last in draw.dim_spans:
                rows[:, first:last] = 0.0

    def _rows_per_block(self, num_rows: int) -> int:
        if self.device.type != "cpu":
            return max(1, num_rows)
        values = _SERIAL_VALUES if torch.get_num_threads() > 1 else _CACHED_VALUES
        return max(1, values // self.dim)

    def _fixed_affine(self) -> Affine:
        """Return the map of stored values that is the same for every clip: decoding, and with it normalisation."""
        kind, mean, inverse = self._normalization.kind, self._normalization.mean, self._normalization.scale
        storage = self._storage
        if storage.center is None or storage.scale is None:
            if kind != "corpus":
                return _copy
            shift, factor = self._vector(mean), self._vector(inverse)
            # As two operations: what is subtracted first cancels exactly, however far the values are from zero.
            return lambda source, block: torch.sub(source, shift, out=block).mul_(factor)
        scale, offset = storage.scale.astype(np.float64), storage.center.astype(np.float64)
        if kind == "corpus":
            scale, offset = scale * inverse, (offset - mean) * inverse
        return self._multiply_add(scale, offset)

    def _clip_affine(self, stored: Tensor) -> Affine:
        """Return the map that brings this clip to zero mean and unit variance."""
        features = self._storage.decode(stored.cpu().numpy())
        mean, inverse = clip_statistics(features)
        shift, factor = self._vector(mean), self._vector(inverse)
        decode = self._affine

        def apply(source: Tensor, block: Tensor) -> None:
            decode(source, block)
            block.sub_(shift).mul_(factor)

        return apply

    def _multiply_add(self, scale: npt.NDArray[np.float64], offset: npt.NDArray[np.float64]) -> Affine:
        factor, shift = self._vector(scale), self._vector(offset)
        return lambda source, block: torch.addcmul(shift, block.copy_(source), factor, out=block)

    def _vector(self, values: npt.NDArray[np.floating]) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.device)


def _copy(source: Tensor, block: Tensor) -> None:
    if source.data_ptr() != block.data_ptr():
        block.copy_(source)
