"""Every shipped launch configuration is accepted by the real `accelerate launch` and starts what it says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, TINY, environment

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


BACKENDS = {
    "deepspeed_zero1": "zero1.json",
    "deepspeed_zero2": "zero2.json",
    "deepspeed_zero3": "zero3.json",
    "deepspeed_zero2_offload": "zero2_offload.json",
    "deepspeed_zero3_offload": "zero3_offload.json",
    "deepspeed_zero3_nvme": "zero3_nvme.json",
}


@pytest.mark.parametrize(("name", "file"), BACKENDS.items())
def test_a_deepspeed_configuration_names_its_file_and_nothing_that_the_file_says(name: str, file: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert content["distributed_type"] == "DEEPSPEED"
    assert content["deepspeed_config"] == {
        "deepspeed_config_file": f"ds_configs/{file}",
        "deepspeed_multinode_launcher": "standard",
    }
    assert (ROOT / "ds_configs" / file).is_file()


TRAINED = ["deepspeed_zero3", "fsdp2"]


@pytest.mark.parametrize(
    "name",
    [
        *TRAINED,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in BACKENDS
            if name not in (*TRAINED, "deepspeed_zero3_nvme")
        ),
    ],
)
def test_a_configuration_of_a_backend_trains_as_it_is(name: str, corpus: Path, tmp_path: Path) -> None:
    flags = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "run"), *TINY, "--max_steps", "2"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    done = subprocess.run(
        [*launcher, "--num_processes", "2", "-m", "trainer.train", *flags],
        env=environment() | {"ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 rank(s)" in done.stdout
    assert "finished at step 2" in done.stdout


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        *BACKENDS,
        "fsdp2",
        "debug_cpu",
        "single_gpu",
        "multi_cpu",
        "multi_gpu",
        "multi_node",
    }
