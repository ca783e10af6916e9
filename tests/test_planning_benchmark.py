"""The planning benchmark runs on a small corpus and ends with the figures it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "planning.py"


def test_a_small_run_ends_with_its_figures(tmp_path: Path) -> None:
    flags = ["--clips", "5000", "--world_size", "64", "--epochs", "2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    figures = json.loads(lines[-1])
    assert "5000 clips, 64 ranks, 512 clips a step: 10 steps an epoch" in lines[0]
    assert (figures["clips"], figures["world_size"], figures["epochs"]) == (5000, 64, 2)
    assert figures["plan_seconds_per_epoch"] > 0
    assert figures["start_seconds"] > 0
    # More than the columns' 16 bytes a clip, which every figure of memory must contain.
    assert figures["planning_memory_mb"] > 16 * 5000 / 1e6
    assert 1.0 <= figures["imbalance"] < 1.1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--clips", "0"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "expected 1 or more" in done.stderr
