"""`signscale launch local`: real processes, real signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.jobs.options import LocalOptions
from launch.local import choose_devices
from tests.conftest import environment
from trainer.errors import InputError
from trainer.job.directory import JobDirectory

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from trainer.job.directory import JobDirectory

mode, rank = sys.argv[1], int(os.environ["RANK"]) if "RANK" in os.environ else 0
job, attempt = JobDirectory(Path(os.environ["SIGNSCALE_JOB"])), os.environ["SIGNSCALE_ATTEMPT"]
print(f"rank {rank} of {os.environ.get('WORLD_SIZE')}, terminal {sys.stdout.isatty()}", flush=True)

def leave(number, frame):
    if rank == 0:
        job.leave_word("RESUME", attempt=attempt, step=7, reason=signal.Signals(number).name)
    sys.exit(0)

if mode == "wait":
    signal.signal(signal.SIGTERM, leave)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "mistake" and rank == 0:
    print("error: what was mistaken", file=sys.stderr)
    sys.exit(2)
if mode == "crash" and rank == 1:
    sys.exit(3)
note = {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "token": os.environ["SIGNSCALE_JOB_TOKEN"]}
Path(f"rank-{rank}.json").write_text(json.dumps(note))
while mode != "finish":
    time.sleep(0.05)
"""

DEADLINE = 90.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder to run in, with the worker in it."""
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path / "run"


def words_of(run: Path, mode: str, *options: str, processes: int = 2) -> list[str]:
    plain = [] if "--launcher" in options else ["--launcher", "plain"]
    launch = ["launch", "local", "--cpu", "--processes", str(processes), *plain, *options]
    return [sys.executable, "-m", "launch.cli", *launch, "--run", str(run), "--", "-m", "worker", mode]


def start(run: Path, mode: str, *options: str, processes: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words_of(run, mode, *options, processes=processes),
        cwd=run.parent,
        env={name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ranks_of(run: Path, count: int = 2) -> list[int]:
    """Wait until the ranks work; return their processes."""
    notes = [run.parent / f"rank-{rank}.json" for rank in range(count)]
    wait_until(lambda: all(note.exists() and note.read_text() for note in notes))
    return [json.loads(note.read_text())["pid"] for note in notes]


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def log_of(run: Path) -> str:
    [log] = JobDirectory.of(run).logs.glob("*.log")
    return log.read_text()


def test_a_command_that_ends_well_is_done_and_recorded(run: Path) -> None:
    launched = start(run, "finish")
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 0, said
    job = JobDirectory.of(run)
    [attempt] = job.history()
    assert attempt.attempt.startswith("local-")
    assert (attempt.word, attempt.ended is not None, attempt.pid) == ("DONE", True, launched.pid)
    for rank in (0, 1):
        assert f"rank {rank} of 2, terminal False" in said
        assert f"rank {rank} of 2, terminal False" in log_of(run)
        note = json.loads((run.parent / f"rank-{rank}.json").read_text())
        assert note["token"] == attempt.attempt
        assert int(note["threads"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert json.loads(job.plan.read_text())["ranks_per_node"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_asks_all_ranks_to_save_and_leave(run: Path, number: signal.Signals) -> None:
    launched = start(run, "wait")
    ranks = ranks_of(run)
    launched.send_signal(number)
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 0, said
    assert "saving and stopping; once more stops at once" in said
    job = JobDirectory.of(run)
    assert number.name in job.stop.read_text()
    [attempt] = job.history()
    assert (attempt.word, attempt.step, attempt.reason) == ("RESUME", 7, "SIGTERM")
    assert all(map(is_gone, ranks))


def test_two_signals_end_everything_at_once(run: Path) -> None:
    launched = start(run, "deaf")
    ranks = ranks_of(run)
    launched.send_signal(signal.SIGINT)
    wait_until(JobDirectory.of(run).stop.exists)
    assert not any(map(is_gone, ranks))
    launched.send_signal(signal.SIGINT)
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 1
    assert "stopping at once" in said
    wait_until(lambda: all(map(is_gone, ranks)))
    [attempt] = JobDirectory.of(run).history()
    assert (attempt.word, attempt.reason) == (None, "ended at once, on request")


def test_a_terminal_that_hangs_up_does_not_end_the_run_before_it_has_saved(run: Path) -> None:
    launched = start(run, "wait")
    ranks_of(run)
    assert launched.stdout is not None
    launched.stdout.close()
    launched.send_signal(signal.SIGHUP)
    assert launched.wait(timeout=DEADLINE) == 0
    assert "saving and stopping" in log_of(run)
    assert JobDirectory.of(run).history()[0].word == "RESUME"


def test_a_mistake_of_the_user_is_exit_code_2_and_a_crash_is_1(run: Path) -> None:
    launched = start(run, "mistake")
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 2
    assert said.count("error: what was mistaken") == 1
    word = JobDirectory.of(run).last_word()
    assert word is not None
    assert word.word == "FAILED"
    launched = start(run, "crash")
    launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 1
    assert JobDirectory.of(run).last_word() is None
    assert [attempt.word for attempt in JobDirectory.of(run).history()] == ["FAILED", None]


def test_on_a_terminal_ranks_see_one_and_the_log_keeps_whole_lines(run: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words_of(run, "finish"), cwd=run.parent, env=environment(), stdout=theirs, stderr=theirs
    ) as one:
        os.close(theirs)
        shown = b""
        while part := _read(ours):
            shown += part
    assert one.returncode == 0
    os.close(ours)
    assert b"rank 1 of 2, terminal True" in shown
    assert sorted(log_of(run).splitlines()) == ["rank 0 of 2, terminal True", "rank 1 of 2, terminal True"]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_under_accelerate_the_ranks_message_stands_alone(run: Path) -> None:
    """No page of the launcher's own about what a rank has said in a line."""
    launched = start(run, "mistake", "--launcher", "accelerate")
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 2, said
    assert said.count("error: what was mistaken") == 1
    assert "Traceback" not in said
    assert "torch" not in said.partition("error: what")[2]


def test_under_accelerate_one_signal_reaches_the_ranks_once(run: Path) -> None:
    launched = start(run, "wait", "--launcher", "accelerate")
    ranks = ranks_of(run)
    launched.send_signal(signal.SIGINT)
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 0, said
    assert "Traceback" not in said
    assert JobDirectory.of(run).history()[0].word == "RESUME"
    assert all(map(is_gone, ranks))


def test_the_configuration_fits_the_devices() -> None:
    def choose(*, processes: int = 0, named: str = "") -> tuple[int, str]:
        ranks, use_cpu, config = choose_devices(LocalOptions(processes=processes, cpu=True), named)
        assert use_cpu
        return ranks, Path(config).stem

    assert choose() == (1, "debug_cpu")
    assert choose(processes=3) == (3, "multi_cpu")
    assert choose(processes=2, named="fsdp2") == (2, "fsdp2")
    with pytest.raises(InputError, match="there is no such file"):
        choose(named="fsdp3")


@pytest.mark.parametrize(
    ("gpus", "processes", "expected"),
    [(1, 0, (1, "single_gpu")), (4, 0, (4, "multi_gpu")), (4, 2, (2, "multi_gpu")), (4, 1, (1, "single_gpu"))],
)
def test_gpus_get_a_rank_each(
    gpus: int, processes: int, expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.count_gpus", lambda: gpus)
    ranks, use_cpu, config = choose_devices(LocalOptions(processes=processes), "")
    assert (ranks, Path(config).stem) == expected
    assert not use_cpu
    with pytest.raises(InputError, match="each rank needs one; lower it, or add --cpu"):
        choose_devices(LocalOptions(processes=gpus + 1), "")
