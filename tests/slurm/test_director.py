"""The director as the process that it is, led by words alone: no cluster is asked for an attempt that is done."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.jobs.plan import Plan, Task
from launch.slurm.attempt import find
from tests.conftest import ROOT, environment
from trainer.job.directory import AttemptRecord, JobDirectory

LEAVE = """
import sys, time
from pathlib import Path
from trainer.job.directory import JobDirectory
job = JobDirectory(Path(sys.argv[1]))
while sys.argv[2] == "when asked" and not job.stop.exists():
    time.sleep(0.02)
job.leave_word("DONE", attempt="7.1", step=40, reason="all is done", code=int(sys.argv[3]))
print("left")
"""


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    """A job that was launched."""
    plan = Plan(
        way="slurm",
        name="job",
        run=tmp_path / "run",
        command=("-m", "module"),
        module="module",
        arguments=(),
        interpreter=sys.executable,
        created=0.0,
    )
    plan.save()
    return plan.job


def director(job: JobDirectory, *command: str, **more: str) -> subprocess.Popen[str]:
    """Start it as the batch script of job 7 does, in its second attempt."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.slurm.director", "--job", str(job.folder), "--", *command],
        env=environment() | batch | more,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def leave(job: JobDirectory, when: str = "at once", code: int = 0) -> list[str]:
    """A command that leaves DONE."""
    return [sys.executable, "-c", LEAVE, str(job.folder), when, str(code)]


@pytest.mark.parametrize("code", [0, 1])
def test_done_ends_with_the_command_s_own_code(job: JobDirectory, code: int) -> None:
    process = director(job, *leave(job, code=code))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "done: all is done" in said
    (record,) = job.history()
    assert (record.attempt, record.job_id, record.word) == ("7.1", "7", "DONE")
    assert (job.logs / "7.1.log").read_text() == "left\n"


def test_every_signal_is_one_request_to_stop(job: JobDirectory) -> None:
    process = director(job, *leave(job, "when asked"))
    deadline = time.monotonic() + 120
    while not job.attempts.exists():
        assert time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.02)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
        if process.poll() is None:
            os.kill(process.pid, number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("asking the ranks") == 1
    assert job.stop.exists()


def test_what_ended_before_its_script_could_say_so_is_not_done_again(job: JobDirectory) -> None:
    job.begin(AttemptRecord(attempt="7.0", began=1.0, job_id="7"))
    job.leave_word("DONE", attempt="7.0", step=40, reason="all is done")
    process = director(job, "false")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    (record,) = job.history()
    assert (record.word, record.ended is not None) == ("DONE", True)


def test_an_attempt_that_slurm_took_back_gets_its_end_from_the_next(job: JobDirectory) -> None:
    job.begin(AttemptRecord(attempt="7.0", began=1.0, job_id="7"))
    process = director(job, *leave(job))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    first, second = job.history()
    assert (first.word, first.reason) == (None, "left without a word (preempted, or its node failed)")
    assert second.word == "DONE"


def test_a_job_cancelled_while_it_waited_starts_nothing(job: JobDirectory, tmp_path: Path) -> None:
    job.cancel("cancelled by a test")
    process = director(job, "touch", str(tmp_path / "started"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "stop: stopped on request: cancelled by a test" in said
    assert not (tmp_path / "started").exists()


def test_a_task_of_a_cancelled_array_starts_nothing(job: JobDirectory, tmp_path: Path) -> None:
    tasks = tuple(Task(run=tmp_path / str(number), overrides={}) for number in range(2))
    dataclasses.replace(Plan.load(job.plan), tasks=tasks).save()
    # The task had no attempt yet when its array was cancelled, and so nothing in its own folder.
    job.cancel("cancelled by a test")
    process = director(job, "touch", str(tmp_path / "started"), SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="1")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "stop: stopped on request: cancelled by a test" in said
    assert not (tmp_path / "started").exists()
    assert [record.attempt for record in JobDirectory.of(tmp_path / "1").history()] == ["6_1.1"]


def test_a_job_launched_again_has_all_its_attempts(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, began in enumerate((100.0, 200.0, 400.0)):
        job.begin(AttemptRecord(attempt=f"{number}.0", began=began))
        job.end(f"{number}.0", step=8, word=None, reason="left")
    dataclasses.replace(Plan.load(job.plan), created=300.0).save()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    leading = find(job.folder)
    job.begin(AttemptRecord(attempt=leading.attempt, began=500.0))
    assert [record.attempt for record in leading.earlier()] == ["2.0"]
    assert leading.step_at_launch() == 8


def test_a_job_that_was_lost_too_often_starts_nothing(job: JobDirectory, tmp_path: Path) -> None:
    for number in range(10):
        job.begin(AttemptRecord(attempt=f"6.{number}", began=1.0, job_id="6", nodes="node[1-2]"))
    process = director(job, "touch", str(tmp_path / "started"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert not (tmp_path / "started").exists()
    word = job.last_word()
    assert word is not None
    assert (word.word, "on node[1-2]; does the job bring" in word.reason) == ("FAILED", True)


def test_the_director_does_not_wait_for_ranks_past_the_time_limit(job: JobDirectory) -> None:
    end = time.time() + 12
    process = director(job, "sleep", "60", SLURM_JOB_END_TIME=str(end))
    said, _ = process.communicate(timeout=50)
    assert "still at work; not waiting" in said
    (record,) = job.history()
    assert record.ended is not None
    assert record.ended < end + 30
    assert "did not save and leave in time" in str(record.reason)


def test_a_limit_that_is_moved_moves_the_end_of_the_wait(job: JobDirectory, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    # Silent at first, which changes nothing.
    squeue.write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; echo 'Socket timed out' >&2; exit 1; }}\n"
        f'[ "$3" = 7 ] && echo 0:09\n'
    )
    squeue.chmod(0o755)
    began = time.time()
    process = director(job, "sleep", "150", SLURM_JOB_END_TIME=str(began + 120), PATH=f"{tmp_path}:/usr/bin:/bin")
    said, _ = process.communicate(timeout=180)
    assert "s, by what SLURM says now; telling the ranks" in said
    assert "still at work; not waiting" in said
    # 100 s without.
    assert time.time() - began < 80
    moved = job.moved_end("7.1", None)
    assert moved is not None
    assert moved < began + 90
    assert job.moved_end("7.2", 1.0) == 1.0


def test_a_folder_that_the_node_does_not_see(tmp_path: Path) -> None:
    process = director(JobDirectory.of(tmp_path / "elsewhere"), "true")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "does not see" in said
    assert "file system that all nodes share" in said
    assert not (tmp_path / "elsewhere").exists()
