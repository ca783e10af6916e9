"""The benchmarks run, end with one line of JSON, and the deterministic bars hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script: str, *flags: str, cwd: Path) -> str:
    # From another directory: a benchmark finds the packages by itself.
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *flags], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def figures_of(output: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return figures


@pytest.fixture(scope="module")
def batching(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return figures_of(run("batching.py", "--epochs", "3", cwd=tmp_path_factory.mktemp("batching")))


def test_batching_reports_every_world_size(batching: dict[str, Any]) -> None:
    methods = ("step_over_ideal", "random", "sorted", "padding", "planning_ms", "longest_over_mean")
    assert {f"{method}_{ranks}" for method in methods for ranks in (1, 2, 8, 64)} <= batching.keys()


def test_a_step_is_near_the_ideal_where_random_batches_are_not(batching: dict[str, Any]) -> None:
    assert batching["step_over_ideal_8"] <= 1.15
    assert batching["step_over_ideal_64"] <= 1.06
    assert batching["random_8"] > 1.6
    assert batching["random_64"] > 1.8


def test_nothing_but_guards_is_padding(batching: dict[str, Any]) -> None:
    for ranks in (1, 2, 8, 64):
        assert batching[f"padding_{ranks}"] <= 0.04


def test_the_shuffle_is_uniform_over_clips(batching: dict[str, Any]) -> None:
    # The seed is fixed: these are counts, not draws that differ from run to run.
    low, high = batching["shuffle_max_sigma_expected"]
    assert low <= batching["shuffle_max_sigma"] <= high
    assert abs(batching["shuffle_parts_sigma"]) <= 2
    assert abs(batching["shuffle_length_sigma"]) <= 2


def test_batching_takes_a_table_of_lengths(tmp_path: Path) -> None:
    rows = [f"train,{16 + index % 200}" for index in range(600)] + ["dev,16"] * 3
    (tmp_path / "lengths.csv").write_text("\n".join(["split,num_frames", *rows]) + "\n")
    flags = ("--lengths", "lengths.csv", "--epochs", "2", "--shuffle_epochs", "20")
    assert figures_of(run("batching.py", *flags, cwd=tmp_path))["clips"] == 600


def test_a_table_without_lengths_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("split,frames\ntrain,10\n")
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / "batching.py"), "--lengths", "lengths.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode != 0
    assert "lengths.csv: expected a CSV with the columns split and num_frames" in finished.stderr


def test_loop_explains_itself(tmp_path: Path) -> None:
    assert "--num_workers" in run("loop.py", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_loop_measures_both_world_sizes_on_the_same_work(tmp_path: Path) -> None:
    figures = figures_of(run("loop.py", "--steps", "1", "--quick", cwd=tmp_path))
    for ranks in (1, 2):
        # The time of a small step on a shared machine says nothing; that both loops arrive at one model does.
        assert isinstance(figures[f"overhead_{ranks}"], float)
        assert figures[f"weights_difference_{ranks}"] <= 1e-4


@pytest.mark.slow
def test_reading_in_bytes_and_packing_clips_are_cheaper_than_the_usual_ways(tmp_path: Path) -> None:
    flags = ["--frames", "20", "--rounds", "3", "--width", "0.1", "--model_size", "32"]
    found = figures_of(run("frames.py", *flags, cwd=tmp_path))
    assert found["JPEG_210x260_resized_crop_of_224_ratio"] > 1.2
    assert found["H.264_320x180_resized_crop_of_224_ratio"] > 1.2
    for model in ("i3d", "mobilenet_v3_small", "mobilenet_v3_large"):
        assert found[f"{model}_packed_ratio"] < 1
        assert found[f"{model}_packed_ratio"] < found[f"{model}_padded_ratio"]
