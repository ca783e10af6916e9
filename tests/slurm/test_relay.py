"""The output of an attempt, and what is read from it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from launch.slurm.relay import ExitNoise, notice_of_cancellation, relay, telling_line

# As torch 2.13 prints it, under `srun --label`; the other node's lines come in between.
SUCCESS = b"""\
0: epoch 3: val/wer 12.5
1: done
1: [W1201 04:05:06.123456789 TCPStore.cpp:138] [c10d] recvValueWithTimeout failed on SocketImpl(fd=3, addr=[node2]:4, \
remote=[node1]:2): Connection reset by peer
1: Exception raised from recvBytes at /pytorch/torch/csrc/distributed/c10d/Utils.hpp:678 (most recent call first):
1: frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x80 (0x7f in /lib/libc10.so)
1: frame #1: <unknown function> + 0x5b (0x7f in /lib/libtorch_cpu.so)
1:\x20
0: saved step 40
1: E1201 04:05:06.234000 77 torch/distributed/elastic/agent/server/api.py:974] Error waiting on exit barrier.
1: E1201 04:05:06.234000 77 torch/distributed/elastic/agent/server/api.py:974] Traceback (most recent call last):
1: E1201 04:05:06.234000 77 torch/distributed/elastic/agent/server/api.py:974]   File "api.py", line 954
1: E1201 04:05:06.234000 77 torch/distributed/elastic/agent/server/api.py:974]     store_util.barrier(
1: E1201 04:05:06.234000 77 torch/distributed/elastic/agent/server/api.py:974] torch.distributed.DistNetworkError
1: closing the report
"""


def relayed(tmp_path: Path, source: bytes, *, done: bool) -> tuple[str, int]:
    onward, noise = io.BytesIO(), ExitNoise(lambda: done)
    relay(io.BytesIO(source), tmp_path / "log", onward, noise)
    assert onward.getvalue() == (tmp_path / "log").read_bytes()
    return onward.getvalue().decode(), noise.lines


def test_a_successful_end_looks_like_one(tmp_path: Path) -> None:
    text, lines = relayed(tmp_path, SUCCESS, done=True)
    assert text == "0: epoch 3: val/wer 12.5\n1: done\n0: saved step 40\n1: closing the report\n"
    assert lines == SUCCESS.count(b"\n") - 4


def test_before_the_end_the_same_lines_are_a_failure_s(tmp_path: Path) -> None:
    assert relayed(tmp_path, SUCCESS, done=False) == (SUCCESS.decode(), 0)


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", ""),
        ("starting\n\n", "starting"),
        (
            "0: ValueError: no such gloss\n1: waiting\nsrun: error: node1: task 0: Exited with exit code 1\n",
            "no such gloss",
        ),
        ("1: step 3\nsrun: error: Node failure on node2\n", "Node failure on node2"),
        ("error: old.csv is missing\nRuntimeError: newer\nbye\n", "RuntimeError: newer"),
    ],
)
def test_the_line_that_tells_most(tmp_path: Path, log: str, line: str) -> None:
    (tmp_path / "log").write_text(log)
    found = telling_line(tmp_path / "log")
    assert line in found
    assert bool(found) == bool(line)


def test_no_log_tells_nothing(tmp_path: Path) -> None:
    assert telling_line(tmp_path / "log") == ""
    assert notice_of_cancellation(tmp_path / "log") is None


@pytest.mark.parametrize(
    ("suffix", "why"), [("", ""), ("DUE TO TIME LIMIT ", "TIME LIMIT"), ("DUE TO PREEMPTION ", "PREEMPTION")]
)
def test_why_slurm_ended_a_step(tmp_path: Path, suffix: str, why: str) -> None:
    notice = f"0: slurmstepd-node1: error: *** STEP 1.0 ON node1 CANCELLED AT 2026-12-01T04:43:48 {suffix}***\n"
    (tmp_path / "log").write_text(notice)
    assert notice_of_cancellation(tmp_path / "log") == why
