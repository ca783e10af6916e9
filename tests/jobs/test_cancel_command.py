"""`signscale cancel`: a save is asked for first; what belongs to nobody here is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import job_cancel, job_status
from tests.jobs.conftest import begin, local_fields
from trainer.errors import InputError
from trainer.job.directory import JobDirectory

Launch = Callable[..., JobDirectory]
ROOT = Path(__file__).parents[2]

_LEADER = """
import os, platform, signal, sys, time
from pathlib import Path
from trainer.job.directory import AttemptRecord, JobDirectory

job, stubborn = JobDirectory(Path(sys.argv[1])), sys.argv[2] == "stubborn"
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
job.begin(AttemptRecord(attempt="local-1-1", began=time.time(), host=platform.node(), pid=os.getpid()))
while stubborn or not (asked and job.stop.exists()):
    time.sleep(0.05)
job.leave_word("RESUME", attempt="local-1-1", step=7, reason="stopped on request")
job.end("local-1-1", step=7, word="RESUME", reason="stopped on request")
"""


@pytest.fixture
def lead(launch: Launch) -> Iterator[Callable[[str], tuple[JobDirectory, subprocess.Popen[bytes]]]]:
    """Start a process that leads an attempt: `willing` saves when asked by file and signal, `stubborn` never does."""
    started: list[subprocess.Popen[bytes]] = []

    def start(temper: str) -> tuple[JobDirectory, subprocess.Popen[bytes]]:
        job = launch("teacher", way="local")
        started.append(subprocess.Popen([sys.executable, "-c", _LEADER, str(job.folder), temper], cwd=ROOT))
        end = time.monotonic() + 60
        while not job.attempts.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        return job, started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_local_run_saves_and_leaves(
    lead: Callable[[str], tuple[JobDirectory, subprocess.Popen[bytes]]], capsys: pytest.CaptureFixture[str]
) -> None:
    job, process = lead("willing")
    # A zombie would count as gone too; whoever started it reaps it at the end.
    assert job_cancel.main([str(job.folder.parent)]) == 0
    assert process.wait(timeout=60) == 0
    printed = capsys.readouterr().out
    assert "asked to save and leave" in printed
    assert "CANCELLED: cancelled by" in printed
    assert "saved at step 7" in printed
    assert job.cancelled() is not None


def test_what_does_not_leave_is_ended(
    lead: Callable[[str], tuple[JobDirectory, subprocess.Popen[bytes]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.jobs.ending._SECONDS_TO_DIE", 1.0)
    job, process = lead("stubborn")
    assert job_cancel.main([str(job.folder.parent), "--timeout", "1"]) == 0
    assert process.wait(timeout=60) == -signal.SIGKILL
    (attempt,) = job.history()
    assert attempt.ended is not None, "a plain command would take the run for one that is still worked on"
    assert attempt.word is None


def test_there_is_nothing_to_cancel(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", **local_fields(1))
    job.leave_word("DONE", attempt="local-1-1", step=3, reason="finished")
    assert job_cancel.main([str(job.folder.parent)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert job.cancelled() is None


def test_a_process_that_got_the_number_later_is_not_signalled(
    launch: Launch, living: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", ago=3600, **local_fields(living.pid))
    assert job_cancel.main([str(job.folder.parent), "--now"]) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert living.poll() is None


def test_another_machine_is_asked_by_file_alone(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", host="somewhere-else", pid=os.getpid())
    assert job_cancel.main([str(job.folder.parent)]) == 0
    assert "process" in (said := capsys.readouterr().out)
    assert "on somewhere-else is asked to save and leave" in said
    assert job.stop.exists()


def test_where_slurm_does_not_answer_the_files_ask(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = launch("teacher", job_id="7")
    begin(job, "7.0")
    assert job_cancel.main([str(job.folder.parent)]) == 1
    assert "squeue is not on the PATH" in capsys.readouterr().err
    assert job.cancelled() is not None
    assert job.stop.exists()


def test_a_task_is_cancelled_by_its_own_folder(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is its array that recorded the job."""
    tasks = [{"run": str(tmp_path / "runs" / "sweep" / name), "overrides": {}} for name in "ab"]
    whole = launch("sweep", tasks=tasks, job_id="7")
    for task in tasks:
        Path(task["run"]).mkdir()
    # Two tasks that wait, until one is cancelled.
    form = f"%s|7|%s|PENDING|Resources|N/A|N/A|0:00|1:00:00||(null)|{whole.script}".replace("|", "\x1f")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool, script in (
        ("squeue", f"[ -e {tools}/gone ] || echo '{form % ('7_1', '1')}'\necho '{form % ('7_0', '0')}'"),
        ("scancel", f'echo "$@" >> {tools}/gone'),
        ("sacct", "exit 1"),
    ):
        (tools / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert job_status.main([str(whole.folder.parent)]) == 0
    shown = capsys.readouterr().out
    assert f"signscale logs -f {whole.folder.parent} --task 0 " in shown
    assert job_status.main([tasks[1]["run"]]) == 0
    assert f"signscale cancel {tasks[1]['run']} " in capsys.readouterr().out
    assert job_cancel.main([tasks[1]["run"]]) == 0
    assert (tools / "gone").read_text() == "--state=PENDING 7_1\n"
    assert "job 7_1: taken out of the queue" in capsys.readouterr().out
    assert whole.cancelled() is None


def test_mistakes(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match="was not launched"):
        job_cancel.main([str(tmp_path / "plain")])
    job = launch("teacher")
    with pytest.raises(InputError, match="the job is no array"):
        job_cancel.main([str(job.folder.parent), "--task", "3"])
    whole = launch("sweep", tasks=[{"run": str(tmp_path / "runs" / "sweep" / "0"), "overrides": {}}])
    with pytest.raises(InputError, match="expected 0 to 0"):
        job_cancel.main([str(whole.folder.parent), "--task", "1"])
