"""The memory benchmark measures real ranks of a small model and sets what the estimate says beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"
SMALL = ["--width", "0.6", "--rnn_size", "192", "--feature_dim", "64", "--clips", "8", "--budget", "120"]


def run(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    done = run(*SMALL, "--backends", "zero2,replicated", "--steps", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_backend_has_what_its_fuller_rank_took_in_each_phase(figures: dict[str, Any]) -> None:
    assert [row["backend"] for row in figures["rows"]] == ["zero2", "replicated"]
    for row in figures["rows"]:
        assert list(row["phases"]) == ["prepare", "passes 1", "update 1", "passes 2", "update 2"]
        assert row["measured"] == max(row["phases"].values()) == row["phases"][row["at"]]
    # Of data parallelism, where that was measured before.
    assert [row["share"] for row in figures["rows"]] == [None, 1.0]
    assert figures["worst"] == max(abs(row["error"]) for row in figures["rows"])
    assert figures["met"] is (figures["worst"] <= figures["bar"])


def test_measured_is_what_the_estimate_says_but_for_what_a_small_model_does_not_hide(figures: dict[str, Any]) -> None:
    for row in figures["rows"]:
        estimate = row["estimate"]
        kept = estimate["parameters"] + estimate["gradients"] + estimate["optimizer"]
        # Of a model of a few million weights, what code and kernels take is as large as what it takes itself.
        assert kept <= row["measured"] <= 1.15 * row["predicted"] + 100e6


def test_mistakes_are_refused(tmp_path: Path) -> None:
    for flags, message in (
        (["--backends", "zero4"], "choose from replicated"),
        (["--ranks", "1"], "expected 2 or more"),
        (["--steps", "0"], "expected 1 or more"),
    ):
        done = run(*flags, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
