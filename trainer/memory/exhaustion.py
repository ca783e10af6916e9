"""Telling that memory ran out from all other failures, and giving back what can be given back."""

from __future__ import annotations

import gc

import torch

_MESSAGES = (
    # torch's CPU allocator; cuBLAS and cuDNN when their workspaces do not fit.
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
)


def is_exhaustion(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, of the device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def free_memory() -> None:
    """Give back what no tensor uses any more; the exception's traceback must be gone, since it holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
