"""Ranks of a launched job: they meet none of another job, stop together, go on to the same bits, and obey the fence."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, column, command, environment, metrics, weights
from trainer.job.directory import ATTEMPT, JOB, TOKEN, AttemptRecord, JobDirectory, LastWord

RUN = [
    *["--max_steps", "100000", "--epochs", "100000", "--evaluate_every", "99999", "--log_every", "1"],
    *["--batch_size", "7", "--gradient_accumulation_steps", "1", "--augment", "true", "--dropout", "0.3"],
]
"""A run that neither ends nor saves by itself."""


def begin(run: Path, attempt: str) -> JobDirectory:
    directory = JobDirectory.of(run)
    directory.begin(AttemptRecord(attempt=attempt, began=time.time()))
    return directory


def variables(run: Path, attempt: str) -> dict[str, str]:
    """What a launcher tells the ranks of an attempt."""
    return {JOB: str(run / "job"), ATTEMPT: attempt, TOKEN: f"token of {attempt}"}


def start(
    world_size: int, corpus: Path, run: Path, *flags: str, extra: dict[str, str], module: str = "trainer.train"
) -> subprocess.Popen[str]:
    arguments = ["--data_dir", str(corpus), "--output_dir", str(run), *TINY, *RUN, *flags]
    return subprocess.Popen(
        command(world_size, module, arguments),
        env=environment() | extra,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """Wait for a group of processes, and end it should that take too long."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return output


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the run ended by itself: {process.communicate()[0][-3000:]}")
        log = run / "metrics.jsonl"
        if log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines()[:-1]):
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"no step {step} within {timeout} s: {process.communicate()[0][-3000:]}")


def word(job: JobDirectory) -> LastWord:
    found = job.last_word()
    assert found is not None
    return found


def saved_step(run: Path) -> int:
    return int(json.loads((run / "checkpoints" / "last.json").read_text())["checkpoint"].removeprefix("step-"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_of_two_jobs_that_meet_at_one_port_all_refuse_to_train(corpus: Path, tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    ranks, jobs = [], []
    for rank in (0, 1):
        run = tmp_path / f"run{rank}"
        jobs.append(begin(run, f"{rank}.0"))
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true", **variables(run, f"{rank}.0")}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "trainer.train", "--data_dir", str(corpus), "--output_dir", str(run), *TINY],
                env=environment() | address | own,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    outputs = [finish(rank) for rank in ranks]
    for rank, output in enumerate(outputs):
        assert ranks[rank].returncode == 1, output
        assert f"failed: rank {rank}: ranks of different jobs have met at 127.0.0.1:" in output
        assert "rank 0: 0.0 on " in output
        assert "rank 1: 1.0 on " in output
        assert "token of" not in output
        assert "Traceback" not in output
        # Another try meets at another port.
        assert jobs[rank].last_word() is None
        assert not (tmp_path / f"run{rank}" / "recipe.yaml").exists()


def test_a_stop_file_lets_both_ranks_save_and_leave(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = begin(run, "7.0")
    process = start(2, corpus, run, extra=variables(run, "7.0"))
    wait_for_step(run, 3, process)
    assert not (run / "checkpoints").exists()
    job.request_stop("asked by a test")
    output = finish(process)
    assert process.returncode == 0, output
    said = word(job)
    assert (said.word, said.code, said.step) == ("RESUME", 0, saved_step(run))
    assert said.step == column(run, "step")[-1] >= 3
    assert said.reason.startswith(f"stopped on request (asked by a test) at step {said.step}")
    assert said.reason in output


@pytest.mark.slow
def test_a_run_in_attempts_ends_in_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    job = begin(run, "7.0")
    process = start(2, corpus, run, extra=variables(run, "7.0"))
    wait_for_step(run, 3, process)
    job.request_stop("asked by a test")
    finish(process)
    stopped = word(job).step
    assert stopped is not None
    begin(run, "7.1")
    flags = ["--resume", "auto", "--stop_after_steps", "5"]
    output = finish(start(2, corpus, run, *flags, extra=variables(run, "7.1")))
    assert (word(job).word, word(job).attempt, word(job).step) == ("RESUME", "7.1", stopped + 5), output
    finish(start(2, corpus, whole, "--stop_after_steps", str(stopped + 5), extra={}))
    assert weights(run) == weights(whole)
    assert column(run, "train/loss") == column(whole, "train/loss")


def test_ranks_that_lost_the_run_leave_and_publish_nothing(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, "7.0")
    process = start(2, corpus, run, "--save_every", "1", extra=variables(run, "7.0"))
    wait_for_step(run, 3, process)
    job = begin(run, "7.1")
    output = finish(process)
    assert process.returncode == 1
    assert "failed: another attempt (7.1) has taken over from this one (7.0); nothing was published" in output
    assert job.last_word() is None
    assert saved_step(run) <= len(metrics(run)) - 1
