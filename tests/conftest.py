"""What tests share: a small synthetic corpus, the real one where it is there, and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.pack import main as pack_command
from trainer.data.synthetic import SyntheticSpec, write_corpus

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"

# What nohup, by which these tests may be run, has processes ignore, and theirs after them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Folders and names of the tests that take longest: real processes, a real cluster, benchmarks.
_LONG = ("distributed", "cluster", "benchmark")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files that take minutes begin first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: not any(name in str(item.path.relative_to(ROOT)) for name in _LONG))


# A model of a few thousand parameters: what is tested is the machinery around it.
TINY = ["--width", "0.02", "--rnn_size", "12", "--rnn_layers", "1", "--trackers", "[]", "--train_wer_clips", "0"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic corpus of 40 training clips."""
    out = tmp_path_factory.mktemp("corpus") / "synthetic"
    write_corpus(SyntheticSpec(clips=40, seed=3, vocabulary_size=8, feature_dim=32), out, lambda text: None)
    return out


@pytest.fixture(scope="session", params=["float32", "float16"])
def packed(request: pytest.FixtureRequest, corpus: Path) -> Path:
    """The synthetic corpus, packed in either storage type into shards of a few clips."""
    return pack(corpus, corpus.with_name(f"packed_{request.param}"), "--dtype", request.param)


def pack(source: Path, out: Path, *flags: str) -> Path:
    """Pack a corpus with the real command."""
    assert pack_command([str(source), str(out), "--workers", "1", "--shard_mb", "0.05", *flags]) == 0
    return out


@pytest.fixture(scope="session")
def coffee() -> Path:
    """Real recordings, where they are there."""
    folder = REAL / "asl_coffee"
    if not folder.is_dir():
        pytest.skip("the asl_coffee recordings are not beside this checkout")
    return folder


def reset_process() -> None:
    """Undo what accelerate keeps of a run in this process, for a test that runs a command within it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


_FOREIGN = ("ACCELERATE_", "SIGNSCALE_", "WANDB_", "RANK", "WORLD_SIZE")


def environment() -> dict[str, str]:
    """The environment of a test process: one thread, and none of the launcher's variables of an outer run."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def command(world_size: int, module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of `world_size` real processes: plain python for one, accelerate launch for more."""
    if world_size == 1:
        return [sys.executable, *([module] if module.endswith(".py") else ["-m", module]), *arguments]
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
    target = [module] if module.endswith(".py") else ["-m", module]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, "--num_processes", str(world_size), *target, *arguments]


def launch(
    world_size: int, module: str, arguments: Sequence[str], *, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run real processes to their end."""
    done = subprocess.run(
        command(world_size, module, [str(a) for a in arguments]),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def train(world_size: int, corpus: Path, output_dir: Path, *arguments: str, check: bool = True) -> Any:
    """Train the tiny model."""
    flags = ["--data_dir", corpus, "--output_dir", output_dir, *TINY, *arguments]
    return launch(world_size, "trainer.train", [str(flag) for flag in flags], check=check)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run: Path, name: str) -> list[float]:
    """One metric over the lines that have it."""
    return [row[name] for row in metrics(run) if name in row]


def weights(run: Path) -> bytes:
    """The bytes of the last checkpoint's weights."""
    name = json.loads((run / "checkpoints" / "last.json").read_text())["checkpoint"]
    return (run / "checkpoints" / name / "model.safetensors").read_bytes()
