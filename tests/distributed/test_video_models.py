"""Video models under every backend: one step over three clips is the same, whoever computes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import ROOT, environment
from tests.distributed.backends import variables


def step(backend: str, world_size: int, folder: Path, *flags: str) -> dict[str, np.ndarray]:
    """Return the weights of all video models after one step."""
    out = folder / "weights.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    done = subprocess.run(
        [*launcher, str(Path(__file__).parent / "video_worker.py"), str(out), *flags],
        env=environment() | {"ACCELERATE_USE_CPU": "true"} | variables(backend, folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{backend}: {done.stderr[-5000:]}"
    return load_file(out)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return step("replicated", 1, tmp_path_factory.mktemp("single"))


# Two ranks share three clips: one of them makes its second pass without a clip.
@pytest.mark.parametrize(
    "backend", ["replicated", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "fsdp2"))]
)
def test_two_ranks_take_the_step_of_one(backend: str, single: dict[str, np.ndarray], tmp_path: Path) -> None:
    found = step(backend, 2, tmp_path, "--activation_checkpointing", str(backend != "zero3").lower())
    assert found.keys() == single.keys()
    for name, expected in single.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
