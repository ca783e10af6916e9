"""Cells of a video corpus: frames decoded in the loader's threads, uint8 until the model normalises them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.data.batch import MicroBatch
from trainer.data.cells import Cell, CellPlan, CellStream
from trainer.data.table import Split
from trainer.data.transform import ClipContent
from trainer.data.video.color import apply_color
from trainer.data.video.table import video_table
from trainer.errors import InputError


class VideoCellLoader(CellStream):
    """Loads cells of frames, uint8 `[N, crop, crop, 3]`.

    Only the frames and the part of them that are wanted are copied, into a buffer of a byte per value; colours change
    where the device is, in the reading threads for a CPU.
    """

    def __init__(self, split: Split, *, device: torch.device, num_workers: int, on_host: bool | None = None) -> None:
        """Prepare buffers; `on_host`: where colours change (default: where the device is)."""
        super().__init__(
            split,
            row_values=split.feature_dim,
            dtype=torch.uint8,
            device=device,
            num_workers=num_workers,
            on_host=device.type == "cpu" if on_host is None else on_host,
        )
        self._table = video_table(split)

    def _load(self, plan: CellPlan) -> Cell:
        rows = sum(content.num_frames for content in plan.contents)
        if not len(plan.clips):
            # The stand-in for a cell without clips: darkness.
            darkness = torch.zeros(rows, *self.split.storage.frame_shape, dtype=torch.uint8)
            return Cell(batch=replace(plan.batch, features=darkness), buffer=None)
        buffer = self.pool.acquire(rows)
        try:
            frames = buffer.tensor.view(rows, *self.split.storage.frame_shape)
            for content in plan.contents:
                self._read(int(plan.clips[content.stored]), content, _rows(frames, content))
            if self._on_host:
                _change_colors(frames, plan.contents)
        except BaseException:
            self.pool.release(buffer)
            raise
        return Cell(batch=replace(plan.batch, features=frames), buffer=buffer, contents=plan.contents)

    def _read(self, clip: int, content: ClipContent, out: Tensor) -> None:
        if content.view is None:
            raise TypeError("a clip of a video corpus needs a view")
        try:
            self._table.read_view(self.split.row(clip), content.view, out.numpy())
        except InputError as error:
            named = InputError([f"clip {self.split.id(clip)}: {problem}" for problem in error.problems])
            # The rank that has the clip is the only one to know.
            named.local = True
            raise named from None

    def _on_device(self, cell: Cell) -> MicroBatch:
        if cell.buffer is None:
            return cell.batch.to(self.device)
        # A copy even where the device is the host: the buffer goes back to the pool.
        frames = torch.empty_like(cell.batch.features, device=self.device)
        frames.copy_(cell.batch.features, non_blocking=True)
        _change_colors(frames, cell.contents)
        return replace(cell.batch, features=frames).to(self.device)


def _rows(frames: Tensor, content: ClipContent) -> Tensor:
    return frames[content.start : content.start + content.num_frames]


def _change_colors(frames: Tensor, contents: Sequence[ClipContent]) -> None:
    for content in contents:
        if content.view is not None and content.view.color is not None:
            apply_color(_rows(frames, content), content.view.color)
