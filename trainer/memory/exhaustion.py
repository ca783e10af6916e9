"""Telling that memory ran out from all other failures, and giving back what can be given back."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

_MESSAGES = (
    # torch's CPU allocator; oneDNN, cuBLAS and cuDNN when their code or workspaces do not fit. oneDNN says the same
    # of what it cannot do at all; that shows when a single clip fails too, with its message in the log.
    "can't allocate memory",
    "could not create a primitive",
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


def memory_figures(device: torch.device) -> dict[str, float]:
    """Return what this process holds, in 10^6 bytes: of the device on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return {
            "memory/allocated_mb": torch.cuda.memory_allocated(device) / 1e6,
            "memory/reserved_mb": torch.cuda.memory_reserved(device) / 1e6,
            "memory/peak_mb": torch.cuda.max_memory_allocated(device) / 1e6,
        }
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "memory/resident_mb": int(status["VmRSS"].split()[0]) * 1024 / 1e6,
        "memory/peak_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6,
    }
