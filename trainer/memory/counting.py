"""What a piece of work allocates, counted tensor by tensor: exact, and the same whatever device it will run on.

Memory that kernels take for themselves is not seen, and a kernel may keep other things on a GPU than on a CPU (cuDNN's
LSTM keeps less than torch's). Where the device is at hand, measure there.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Context that counts the bytes of all storages that operations in it make, while they live.

    Storages are counted once, however many tensors view them. What existed before is not counted.
    """

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.live = 0
        """Bytes that live now."""
        self.peak = 0
        """Most bytes that lived at once."""
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in existing:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            # What an operation reads was made before the count began, or is counted already.
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage())
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or storage.device.type == "meta":
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size


class SavedBytes:
    """Context that counts what autograd keeps for the backward pass, each storage once, `existing` ones not at all."""

    def __init__(self, *existing: Tensor) -> None:
        self.total = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor
