"""Runs under every backend on CPUs: real processes, real DeepSpeed engines, real FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TINY, environment

BACKENDS = ["replicated", "zero1", "zero2", "zero3", "zero2_offload", "fsdp2"]

_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def zero(folder: Path, stage: int, **settings: Any) -> Path:
    """Write a DeepSpeed configuration that parts even the tiny model's weights."""
    content = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **settings},
    }
    if stage == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # type: ignore[index]
    path = folder / f"zero{stage}{'_offload' if settings else ''}.json"
    path.write_text(json.dumps(content))
    return path


def variables(backend: str, folder: Path) -> dict[str, str]:
    """What `accelerate launch` would tell the processes."""
    if backend == "fsdp2":
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if backend.startswith("zero"):
        config = zero(folder, int(backend[4]), **(_OFFLOAD if backend.endswith("offload") else {}))
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    return {}


def run(
    backend: str,
    world_size: int,
    corpus: Path,
    output_dir: Path,
    *flags: str,
    module: str = "trainer.train",
    extra: dict[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Train the tiny model under a backend."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    target = [module] if module.endswith(".py") else ["-m", module]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    done = subprocess.run(
        [
            *[sys.executable, *launcher, *target, "--data_dir", str(corpus), "--output_dir", str(output_dir)],
            *[*TINY, *flags],
        ],
        env=environment() | {"ACCELERATE_USE_CPU": "true"} | variables(backend, output_dir.parent) | (extra or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if check and done.returncode:
        output = f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
        pytest.fail(f"{backend}, {world_size} rank(s): exit code {done.returncode}\n{output}")
    return done
