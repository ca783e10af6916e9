"""Every shipped launch configuration is accepted by the real `accelerate launch` and starts what it says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

CONFIGS = ROOT / "accelerate_configs"
PROBE = """
import json, os, sys
import torch, torch.distributed as dist
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    dist.init_process_group("gloo")
    total = torch.ones(1); dist.all_reduce(total)
    if dist.get_rank() == 0: print(json.dumps({"ranks": int(total)}))
    dist.destroy_process_group()
else:
    print(json.dumps({"ranks": 1}))
"""


def _launch(config: Path, probe: Path, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *extra, str(probe)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("name", "ranks"), [("debug_cpu", 1), ("single_gpu", 1), ("multi_cpu", 2), ("multi_gpu", 2)])
def test_accelerate_launch_takes_the_configuration(name: str, ranks: int, tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    output, errors = (process := _launch(CONFIGS / f"{name}.yaml", probe)).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(output.strip().splitlines()[-1]) == {"ranks": ranks}


def test_two_machines_meet_through_the_multi_node_configuration(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = [
        _launch(CONFIGS / "multi_node.yaml", probe, "--machine_rank", str(rank), "--main_process_port", port)
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert json.loads(outputs[0][0].strip().splitlines()[-1]) == {"ranks": 2}


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        "debug_cpu",
        "single_gpu",
        "multi_cpu",
        "multi_gpu",
        "multi_node",
    }
