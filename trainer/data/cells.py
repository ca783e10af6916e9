"""Cells of one split, built ahead of time: read, turned into the model's input, brought to the device.

On a CPU a cell's clips are read one by one into memory that stays in the cache, and transformed from there into the
input, by the threads that read. On a GPU they are read into a pinned buffer of stored values, copied on a stream of
their own, and transformed there: half the bytes on the bus for float16, and nothing for the CPU but the reading.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.batch import MicroBatch
from trainer.data.buffers import Buffer, BufferPool
from trainer.data.normalization import Normalization
from trainer.data.prefetch import background, look_ahead, prefetch
from trainer.data.table import Split
from trainer.data.transform import ClipContent, FeatureTransform

Indices = npt.NDArray[np.int64]
Request = TypeVar("Request")

# Records may lie in the kernel's memory, where nobody may write; nobody does.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

_WARMING_THREADS = 16
"""Requests under way at once to a store that is not on this machine, which answers in tens of milliseconds."""
_WARM_CELLS = 8
"""Cells whose records are fetched ahead of the cells being read."""


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """A cell before anything is read: which clips of the split, what becomes of them, and all but the features."""

    clips: Indices
    """Clips to read, `[n]`: those of the contents in their order, then partners."""
    contents: Sequence[ClipContent]
    batch: MicroBatch
    """The micro-batch, without features."""
    verify: bool = False
    """Whether to check what is read as if for the first time."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell with its buffer, which is given back when the cell has been used; None for one that has none."""

    batch: MicroBatch
    buffer: Buffer | None
    contents: Sequence[ClipContent] = ()
    row_ends: tuple[int, ...] = ()
    """Where each clip's stored values end in the buffer, where they were not transformed yet."""
    arrive: Callable[[], None] = lambda: None
    """Makes whoever computes wait for the features, where they come on a stream of their own."""


class CellStream(ABC):
    """Cells of one split for one device, with memory bounded by the cells that are under way.

    Under way at once are `2 * num_workers + 2` cells: loaded ahead, being loaded, and in use (3 where `num_workers` is
    0), each with a buffer of a row per frame; on a GPU, two cells more are on the device.
    """

    def __init__(
        self,
        split: Split,
        *,
        row_values: int,
        dtype: torch.dtype,
        device: torch.device,
        num_workers: int,
        on_host: bool,
    ) -> None:
        """Prepare buffers; `on_host`: whether nothing has to be brought to the device."""
        self.split = split
        self.device = device
        self.num_workers = num_workers
        self._on_host = on_host
        self.pool = BufferPool(row_values, dtype, limit=max(3, 2 * num_workers + 2), pin_memory=device.type == "cuda")

    @abstractmethod
    def _load(self, plan: CellPlan) -> Cell:
        """Read a cell into a buffer, in any thread."""

    @abstractmethod
    def _on_device(self, cell: Cell) -> MicroBatch:
        """Bring a cell to the device, without waiting for the copies."""

    def cells(
        self, requests: Iterable[Request], plan: Callable[[Request], CellPlan]
    ) -> Generator[MicroBatch, None, None]:
        """Yield the micro-batches of the requests, each valid until the next one is asked for."""
        with (
            ThreadPoolExecutor(_WARMING_THREADS, thread_name_prefix="warm") as warmers,
            contextlib.ExitStack() as stack,
        ):
            if self.split.table.is_local:
                # Planned where it is loaded: drawing augmentation takes milliseconds that the training thread has not.
                loaded = prefetch(
                    requests, lambda request: self._load(plan(request)), self.num_workers, self._give_back
                )
            else:
                planned = background(map(plan, requests), _WARM_CELLS)
                stack.callback(planned.close)
                warmed = look_ahead(planned, _WARM_CELLS, lambda cell: self._warm(cell, warmers))
                loaded = prefetch(warmed, self._load, self.num_workers, self._give_back)
            ready = loaded if self._on_host else background(self._moved(loaded), 1, self._give_back)
            try:
                for cell in ready:
                    cell.arrive()
                    try:
                        yield cell.batch
                    finally:
                        self._give_back(cell)
            finally:
                ready.close()
                loaded.close()
                warmers.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def cell(self, plan: CellPlan) -> Iterator[MicroBatch]:
        """Load one cell at once, out of turn; its buffer goes back at the end of the context."""
        moved = iter([self._load(plan)]) if self._on_host else self._moved(iter([self._load(plan)]))
        cell = next(moved)
        cell.arrive()
        try:
            yield cell.batch
        finally:
            self._give_back(cell)

    def _warm(self, cell: CellPlan, warmers: ThreadPoolExecutor) -> None:
        for index in cell.clips.tolist():
            # Whatever fails here fails again where the clip is read, and is reported there.
            warmers.submit(self.split.table.warm, self.split.row(index))

    def _give_back(self, cell: Cell) -> None:
        if cell.buffer is not None:
            self.pool.release(cell.buffer)

    def _moved(self, cells: Iterator[Cell]) -> Iterator[Cell]:
        """Bring cells to the device, copying and transforming on a stream beside the one that computes."""
        stream = _side_stream(self.device)
        for cell in cells:
            try:
                with stream:
                    batch = self._on_device(cell)
                # The buffer is free for the next cell as soon as its values have left it.
                stream.wait_for_copies()
            finally:
                self._give_back(cell)
            yield Cell(batch=batch, buffer=None, arrive=stream.mark(batch))


class CellLoader(CellStream):
    """Loads cells of features.

    A buffer holds `rows x D` values: float32 on a CPU, as stored on a GPU.
    """

    def __init__(
        self,
        split: Split,
        normalization: Normalization,
        *,
        device: torch.device,
        noise: float = 0.0,
        num_workers: int,
        on_host: bool | None = None,
    ) -> None:
        """Prepare buffers and the transform; `on_host`: where to transform (default: where the device is)."""
        on_host = device.type == "cpu" if on_host is None else on_host
        stored = torch.float16 if split.storage.dtype == np.float16 else torch.float32
        super().__init__(
            split,
            row_values=split.feature_dim,
            dtype=torch.float32 if on_host else stored,
            device=device,
            num_workers=num_workers,
            on_host=on_host,
        )
        self.transform = FeatureTransform(split.storage, normalization, noise=noise, device=device)
        self._stored_dtype = stored
        self._scratch = threading.local()

    def _load(self, plan: CellPlan) -> Cell:
        rows = sum(content.num_frames for content in plan.contents)
        if not len(plan.clips):
            # The stand-in for a cell without clips: silence.
            silence = torch.zeros(rows, self.split.feature_dim)
            return Cell(batch=replace(plan.batch, features=silence), buffer=None)
        lengths = self.split.num_frames[plan.clips].astype(np.int64)
        buffer = self.pool.acquire(rows if self._on_host else int(lengths.sum()))
        try:
            if self._on_host:
                contents = [plan.contents[place] for place in self._on_disk(plan, len(plan.contents))]
                self.transform.fill(buffer.tensor, contents, self._reader(plan))
            else:
                self._read_all(plan, buffer.tensor, lengths)
        except BaseException:
            self.pool.release(buffer)
            raise
        return Cell(
            batch=replace(plan.batch, features=buffer.tensor),
            buffer=buffer,
            contents=plan.contents,
            row_ends=tuple(np.cumsum(lengths).tolist()),
        )

    def _reader(self, plan: CellPlan) -> Callable[[int, Tensor | None], Tensor]:
        """Read clips one by one, into the rows they become or into this thread's scratch."""

        def read(place: int, rows: Tensor | None) -> Tensor:
            index = int(plan.clips[place])
            target = self._scratch_rows(int(self.split.num_frames[index])) if rows is None else rows
            return torch.from_numpy(self.split.read(index, target.numpy(), verify=plan.verify))

        return read

    def _scratch_rows(self, rows: int) -> Tensor:
        held: Tensor | None = getattr(self._scratch, "rows", None)
        if held is None or len(held) < rows:
            held = torch.empty(rows + rows // 4, self.split.feature_dim, dtype=self._stored_dtype)
            self._scratch.rows = held
        return held[:rows]

    def _read_all(self, plan: CellPlan, out: Tensor, lengths: Indices) -> None:
        """Read all clips of a cell end to end, in the order in which they lie on the disk."""
        ends = np.cumsum(lengths)
        for place in self._on_disk(plan, len(plan.clips)):
            target = out[int(ends[place] - lengths[place]) : int(ends[place])].numpy()
            values = self.split.read(int(plan.clips[place]), target, verify=plan.verify)
            if values is not target:
                target[:] = values

    def _on_disk(self, plan: CellPlan, count: int) -> list[int]:
        """Return the places of the cell's first `count` clips in the order in which they lie on the disk."""
        clips = plan.clips[:count]
        order: list[int] = self.split.table.read_order(
            clips if self.split.rows is None else self.split.rows[clips]
        ).tolist()
        return order

    def _on_device(self, cell: Cell) -> MicroBatch:
        batch = cell.batch
        if cell.buffer is None:
            return batch.to(self.device)
        stored = batch.features.to(self.device, non_blocking=True)
        ends = (0, *cell.row_ends)
        rows = sum(content.num_frames for content in cell.contents)
        features = torch.empty(rows, self.split.feature_dim, device=self.device)
        self.transform.fill(features, cell.contents, lambda place, _: stored[ends[place] : ends[place + 1]])
        return replace(batch, features=features).to(self.device)


class _SideStream:
    """A CUDA stream that copies and transforms while another one computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __enter__(self) -> None:
        self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def wait_for_copies(self) -> None:
        """Wait, in this thread alone, until all that was enqueued is done."""
        self._stream.synchronize()

    def mark(self, batch: MicroBatch) -> Callable[[], None]:
        """Return what makes the computing stream wait for the batch and keep its memory until it is done with it."""
        event = self._stream.record_event()

        def wait() -> None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(event)
            for tensor in batch.tensors():
                tensor.record_stream(current)

        return wait


class _NoStream:
    """A device without streams: everything is done when it returns."""

    def __enter__(self) -> None:
        """Enter nothing."""

    def __exit__(self, *error: Any) -> None:
        """Leave nothing."""

    def wait_for_copies(self) -> None:
        """Return: there is nothing to wait for."""

    def mark(self, batch: MicroBatch) -> Callable[[], None]:
        """Return what does nothing."""
        return lambda: None


def _side_stream(device: torch.device) -> _SideStream | _NoStream:
    return _SideStream(device) if device.type == "cuda" else _NoStream()
