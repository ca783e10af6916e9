"""Interrupted runs: killed, stopped, signalled, damaged; on the same number of ranks or on another."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, TINY, column, command, environment, metrics, train, weights

RUN = [
    *["--max_steps", "24", "--save_every", "3", "--log_every", "1", "--evaluate_every", "10", "--batch_size", "7"],
    *["--gradient_accumulation_steps", "1", "--augment", "true", "--dropout", "0.3", "--mixup_alpha", "0.3"],
    *["--warmup_epochs", "1", "--learning_rate", "1e-3", "--shuffle_window", "2"],
]


@pytest.fixture(scope="module", params=[1, 2, 3])
def uninterrupted(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(world size, a run that nobody disturbed)."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(request.param, corpus, run, *RUN)
    return request.param, run


def test_a_run_killed_at_a_random_step_ends_in_the_same_bits(uninterrupted, corpus: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    world_size, whole = uninterrupted
    run = tmp_path / "run"
    at = random.randint(4, 15)
    print(f"killed after step {at}")
    flags = ["--data_dir", str(corpus), "--output_dir", str(run), *TINY, *RUN]
    process = subprocess.Popen(
        command(world_size, "trainer.train", flags),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for_step(run, at, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(column(run, "train/loss")) < 24, "the run ended before it was killed"
    train(world_size, corpus, run, *RUN, "--resume", "auto")
    assert weights(run) == weights(whole)
    assert column(run, "train/loss") == column(whole, "train/loss")
    assert [row["step"] for row in metrics(run)] == [row["step"] for row in metrics(whole)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_on_another_world_size_the_run_goes_on_with_the_clips_not_yet_seen(
    corpus: Path, tmp_path: Path, before: int, after: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(1, corpus, whole, *RUN)
    # 9 steps of 7 clips: in the middle of the second epoch of 40.
    train(before, corpus, run, *RUN, "--stop_after_steps", "9")
    assert column(run, "train/loss")[-1] == pytest.approx(column(whole, "train/loss")[8], rel=1e-4)
    train(after, corpus, run, *RUN, "--resume", "auto")
    np.testing.assert_allclose(column(run, "train/loss"), column(whole, "train/loss"), rtol=1e-4)
    attempts = json.loads((run / "environment.json").read_text())
    assert [attempt["world_size"] for attempt in attempts] == [before, after]


def test_sigterm_saves_at_the_next_step_and_leaves(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start_endless(1, corpus, run)
    _wait_for_step(run, 3, process)
    assert not (run / "checkpoints").exists()
    # Preemption sends it twice, and a launcher passes it on once more.
    for _ in range(3):
        process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped on request" in output
    state = json.loads(next((run / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["step"] == column(run, "step")[-1]


def test_one_rank_that_is_asked_to_stop_stops_all(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start_endless(2, corpus, run)
    _wait_for_step(run, 3, process)
    ranks = _children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output[-2000:]
    assert "stopped on request" in output
    assert (run / "checkpoints" / "last.json").exists()


def test_a_validation_that_a_stop_left_undone_is_made_up_for(corpus: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = ["--evaluate_every", "4", "--max_steps", "8", "--log_every", "4"]
    train(1, corpus, whole, *RUN, *flags)
    # The stop falls on the very step that a validation is due at.
    train(1, corpus, run, *RUN, *flags, "--stop_after_steps", "4")
    train(1, corpus, run, *RUN, *flags, "--resume", "auto")
    for name in ("step", "val/wer", "val/loss", "train/loss"):
        assert column(run, name) == column(whole, name)
    assert (run / "checkpoints" / "best.json").read_text() == (whole / "checkpoints" / "best.json").read_text()


def test_linear_scaling_on_more_ranks_still_trains_every_epoch(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [
        "--batch_scaling",
        "linear",
        "--max_steps",
        "0",
        "--epochs",
        "4",
        "--batch_size",
        "5",
        "--mixup_alpha",
        "0",
    ]
    train(1, corpus, run, *RUN, *flags, "--stop_after_steps", "20")
    train(2, corpus, run, *RUN, *flags, "--resume", "auto")
    # 20 steps of 5 clips are two and a half epochs; 60 clips are left, 10 a step.
    assert column(run, "step")[-1] == 26
    assert column(run, "epoch")[-1] == 4


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_resume_auto_passes_over_a_damaged_checkpoint_aloud(corpus: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    train(1, corpus, run, *RUN, "--max_steps", "9", "--keep_checkpoints", "3")
    newest = run / "checkpoints" / "step-000000009" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flip" else content[:-1])
    explicit = train(
        1, corpus, tmp_path / "other", *RUN, "--max_steps", "9", "--resume", str(newest.parent), check=False
    )
    assert explicit.returncode == 2
    assert str(newest) in explicit.stderr
    assert not (tmp_path / "other").exists()
    resumed = train(1, corpus, run, *RUN, "--max_steps", "9", "--resume", "auto")
    assert f"warning: {newest}" in resumed.stdout
    assert "going on from step 6" in resumed.stdout


def _start_endless(world_size: int, corpus: Path, run: Path) -> subprocess.Popen[str]:
    """Start a run that neither ends nor saves by itself."""
    endless = ["--max_steps", "100000", "--epochs", "100000", "--evaluate_every", "99999", "--save_every", "0"]
    flags = ["--data_dir", str(corpus), "--output_dir", str(run), *TINY, *RUN, *endless]
    return subprocess.Popen(
        command(world_size, "trainer.train", flags),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        log = run / "metrics.jsonl"
        if log.exists() and log.read_text().count("train/loss") >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"no step {step} within {timeout} s")


def _children(pid: int) -> list[int]:
    """The processes that a launcher started, in the order of their ranks."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)
