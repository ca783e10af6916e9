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

from tests.conftest import environment
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

def leave_slowly(number, frame):
    while not Path("saved").exists():
        time.sleep(0.05)
    leave(number, frame)

def lose(number, frame):
    if mode == "refuse" and rank == 0:
        job.leave_word("FAILED", attempt=attempt, step=7, reason="the disk is full")
    sys.exit(0 if mode == "refuse" else 5)

if mode == "slow":
    signal.signal(signal.SIGTERM, leave_slowly)
if mode in ("lost", "refuse"):
    signal.signal(signal.SIGTERM, lose)
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


def start(
    run: Path, mode: str, *options: str, processes: int = 2, prefix: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, *words_of(run, mode, *options, processes=processes)],
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
    times = "once more" if number == signal.SIGINT else "twice"
    assert f"saving and stopping; Ctrl-C {times} stops at once" in said
    job = JobDirectory.of(run)
    assert number.name in job.stop.read_text()
    [attempt] = job.history()
    assert (attempt.word, attempt.step, attempt.reason) == ("RESUME", 7, "SIGTERM")
    assert all(map(is_gone, ranks))


def test_ctrl_c_twice_ends_everything_at_once(run: Path) -> None:
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


def test_what_a_closing_terminal_sends_is_one_request(run: Path) -> None:
    """Hang-ups of shell and kernel, TERM and HUP of systemd: nobody wants ranks killed while they save."""
    launched = start(run, "slow")
    ranks = ranks_of(run)
    for count, number in enumerate((signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGINT), 1):
        launched.send_signal(number)
        wait_until(lambda count=count: log_of(run).count("saving and stopping") == count)  # type: ignore[misc]
    assert not any(map(is_gone, ranks))
    (run.parent / "saved").touch()
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 0, said
    [attempt] = JobDirectory.of(run).history()
    assert (attempt.word, attempt.step) == ("RESUME", 7)


def test_under_nohup_a_hang_up_changes_nothing(run: Path) -> None:
    launched = start(run, "wait", prefix=("nohup",))
    ranks = ranks_of(run)
    launched.send_signal(signal.SIGHUP)
    launched.send_signal(signal.SIGTERM)
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 0, said
    # Of two pending signals the lower number is handled first: the hang-up came, and was not heard.
    assert "SIGHUP" not in said
    assert "SIGTERM to the launcher" in JobDirectory.of(run).stop.read_text()
    assert all(map(is_gone, ranks))


def test_cancelling_at_once_reaches_ranks_that_will_not_leave(run: Path) -> None:
    launched = start(run, "deaf")
    ranks = ranks_of(run)
    words = [sys.executable, "-m", "launch.cli", "cancel", "--now", str(run)]
    cancelled = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=DEADLINE)
    assert cancelled.returncode == 0, cancelled.stderr
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 1
    assert "stopping at once" in said
    wait_until(lambda: all(map(is_gone, ranks)))


@pytest.mark.parametrize(("mode", "word"), [("lost", None), ("refuse", "FAILED")])
def test_a_run_that_was_asked_to_save_and_did_not_is_a_failure(run: Path, mode: str, word: str | None) -> None:
    launched = start(run, mode)
    ranks_of(run)
    launched.send_signal(signal.SIGINT)
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 1, said
    [attempt] = JobDirectory.of(run).history()
    assert attempt.word == word
    assert attempt.reason is not None
    assert ("no last word" in attempt.reason) == (word is None)


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


@pytest.mark.slow
def test_under_accelerate_one_signal_reaches_the_ranks_once(run: Path) -> None:
    launched = start(run, "wait", "--launcher", "accelerate")
    ranks = ranks_of(run)
    launched.send_signal(signal.SIGINT)
    said, _ = launched.communicate(timeout=DEADLINE)
    assert launched.returncode == 0, said
    assert "Traceback" not in said
    assert JobDirectory.of(run).history()[0].word == "RESUME"
    assert all(map(is_gone, ranks))
