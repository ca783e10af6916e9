"""Host buffers that are filled again and again: fresh memory costs more than what is written into it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Rows of a pool: `tensor` `[rows, D]` is part of `storage` `[capacity, D]`."""

    tensor: Tensor
    storage: Tensor


class BufferPool:
    """At most `limit` buffers of a few capacities, pinned where they are copied to a device.

    Capacities are rounded up to four steps an octave, so that cells of like size share them: at most a quarter more
    than was asked for. Held at any time: `limit` x the largest buffer, at the most.
    """

    def __init__(self, dim: int, dtype: torch.dtype, *, limit: int, pin_memory: bool) -> None:
        self.limit = limit
        self._dim, self._dtype, self._pin_memory = dim, dtype, pin_memory
        self._free: list[Tensor] = []
        self._lent = 0
        self._lock = threading.Lock()

    def acquire(self, rows: int) -> Buffer:
        """Lend a buffer of `rows` rows, whatever they hold; it must be given back."""
        with self._lock:
            self._lent += 1
            fitting = [storage for storage in self._free if len(storage) >= rows]
            chosen = min(fitting, key=len, default=None)
            if chosen is None and self._free and len(self._free) + self._lent > self.limit:
                # The smallest one gives its place to the one that is needed.
                self._remove(min(self._free, key=len))
            if chosen is not None:
                self._remove(chosen)
        if chosen is None:
            chosen = torch.empty(capacity(rows), self._dim, dtype=self._dtype, pin_memory=self._pin_memory)
        return Buffer(tensor=chosen[:rows], storage=chosen)

    def release(self, buffer: Buffer) -> None:
        """Take a buffer back; what it holds is no longer needed."""
        with self._lock:
            self._lent -= 1
            self._free.append(buffer.storage)
            if len(self._free) + self._lent > self.limit:
                self._remove(min(self._free, key=len))

    def clear(self) -> None:
        """Let go of the buffers that wait to be lent."""
        with self._lock:
            self._free = []

    @property
    def bytes_held(self) -> int:
        """Return the bytes of the buffers that wait to be lent."""
        with self._lock:
            return sum(storage.nbytes for storage in self._free)

    def _remove(self, storage: Tensor) -> None:
        self._free = [other for other in self._free if other is not storage]


def capacity(rows: int) -> int:
    """Round up to one of four steps an octave: 1, 1.25, 1.5 or 1.75 times a power of two."""
    step = 1 << max(0, (max(rows, 1) - 1).bit_length() - 3)
    return -(-max(rows, 1) // step) * step
