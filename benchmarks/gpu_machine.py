"""What the GPU benchmark asks in a process of its own: which machine this is, and how many operations a frame takes.

    gpu_machine.py machine
    gpu_machine.py flops FEATURE_DIM CLASSES WIDTH RNN_SIZE RNN_LAYERS

The last line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

_LENGTHS = (64, 128)


def main(argv: Sequence[str]) -> int:
    """Answer one question."""
    answer = machine() if argv[0] == "machine" else flops(*argv[1:])
    print(json.dumps(answer))
    return 0


def machine() -> dict[str, Any]:
    """Name the device and what runs on it."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cuda_available": torch.cuda.is_available(),
        "device": "cpu",
        "cores": len(os.sched_getaffinity(0)),
    }
    if not torch.cuda.is_available():
        return found | {"bf16": True}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return found | {
        "device": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_in_products": torch.backends.cuda.matmul.allow_tf32,
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        # Not every container shows it.
        return None
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), None)


def flops(feature_dim: str, classes: str, width: str, rnn_size: str, rnn_layers: str) -> dict[str, Any]:
    """Count the teacher's floating-point operations per real frame, forward and backward; guards do not count.

    On the CPU, where the LSTM is made of products that the counter sees; on CUDA it is one call that counts as nothing.
    """
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.memory.cells import random_cell
    from trainer.models.build import build_model
    from trainer.recipe import ModelRecipe

    recipe = ModelRecipe(width=float(width), rnn_size=int(rnn_size), rnn_layers=int(rnn_layers))
    model = build_model(recipe, feature_dim=int(feature_dim), num_classes=int(classes)).train()
    counts = []
    for length in _LENGTHS:
        cell = random_cell(
            np.array([length]),
            total_stride=recipe.total_stride,
            feature_dim=int(feature_dim),
            num_classes=int(classes),
            device=torch.device("cpu"),
        )
        with FlopCounterMode(display=False) as counter:
            model(cell.features, cell.layout).sum().backward()
        counts.append(counter.get_total_flops())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"flops_per_frame": (counts[1] - counts[0]) / (_LENGTHS[1] - _LENGTHS[0]), "parameters": parameters}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
