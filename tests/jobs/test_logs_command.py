"""`signscale logs`: all of a job's words, one rank's, and those still to come, over a requeue to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import job_logs
from tests.jobs.conftest import begin, local_fields
from trainer.errors import InputError
from trainer.job.directory import JobDirectory

Launch = Callable[..., JobDirectory]
ROOT = Path(__file__).parents[2]


def write_rank(directory: JobDirectory, attempt: str, node: int, local: int, text: str) -> None:
    """Write as torchrun does under `--tee 3 --log_dir` (torch 2.13)."""
    folder = directory.logs / attempt / f"node-{node}" / "none_vshbtdyx" / "attempt_0" / str(local)
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_text(text)
    (folder / "stderr.log").write_text(f"warning of {text}")


def started(launch: Launch, *, way: str = "local") -> JobDirectory:
    job = launch("teacher", way=way)
    begin(job, "local-1-1", ago=0, **local_fields(os.getpid()))
    job.logs.mkdir()
    (job.logs / "local-1-1.log").write_text("first\nsecond")
    return job


def test_the_newest_log_is_printed_as_it_is(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = started(launch)
    assert job_logs.main([str(job.folder.parent)]) == 0
    assert capsys.readouterr().out == "first\nsecond"


def test_an_older_attempt(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = started(launch)
    begin(job, "local-2-2", **local_fields(os.getpid()))
    assert job_logs.main([str(job.folder.parent), "--attempt", "local-1-1"]) == 0
    assert capsys.readouterr().out.startswith("first")
    with pytest.raises(InputError, match="expected one of: local-1-1, local-2-2"):
        job_logs.main([str(job.folder.parent), "--attempt", "local-3-3"])


def test_no_log_yet_says_what_is_waited_for(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = launch("teacher", job_id="7")
    assert job_logs.main([str(job.folder.parent)]) == 1
    assert "no log yet; UNKNOWN: squeue is not on the PATH" in capsys.readouterr().err


def test_what_a_job_said_before_its_first_attempt(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = launch("teacher", job_id="7")
    job.logs.mkdir()
    (job.logs / "slurm-7.out").write_text("signscale: node1 has no /venv/bin/python\n")
    assert job_logs.main([str(job.folder.parent)]) == 0
    assert "node1 has no" in capsys.readouterr().out


def test_a_rank_is_counted_over_the_nodes(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = started(launch, way="slurm")
    for node in range(2):
        for local in range(2):
            write_rank(job, "local-1-1", node, local, f"rank {2 * node + local}\n")
    assert job_logs.main([str(job.folder.parent), "--rank", "3"]) == 0
    assert capsys.readouterr().out == "==> stdout.log\nrank 3\n==> stderr.log\nwarning of rank 3\n"
    with pytest.raises(InputError, match=r"--rank 7: .* expected one of: 0, 1, 2, 3$"):
        job_logs.main([str(job.folder.parent), "--rank", "7"])
    with pytest.raises(InputError, match="expected a whole number from 0 on"):
        job_logs.main([str(job.folder.parent), "--rank", "-1"])


def test_a_run_without_files_per_rank(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = started(launch)
    job.leave_word("DONE", attempt="local-1-1", step=1, reason="finished")
    assert job_logs.main([str(job.folder.parent), "--rank", "0"]) == 1
    assert "leave --rank out" in capsys.readouterr().err
    tried = launch("tried", way="debug")
    begin(tried, "local-1-1", **local_fields(1))
    tried.leave_word("DONE", attempt="local-1-1", step=1, reason="finished")
    assert job_logs.main([str(tried.folder.parent)]) == 1
    assert "keeps no log; DONE" in capsys.readouterr().err


def test_a_run_that_nobody_launched_has_no_log(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match="was not launched"):
        job_logs.main([str(tmp_path)])


def test_an_array_is_asked_for_by_task(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "runs" / "sweep" / "0"
    whole = launch("sweep", tasks=[{"run": str(task), "overrides": {}}])
    with pytest.raises(InputError, match="array of 1 tasks; name one: --task 0"):
        job_logs.main([str(whole.folder.parent)])
    with pytest.raises(InputError, match="--task 1: no such task; expected 0 to 0"):
        job_logs.main([str(whole.folder.parent), "--task", "1"])
    assert job_logs.main([str(whole.folder.parent), "--task", "0"]) == 1
    assert "no log yet" in capsys.readouterr().err
    job = JobDirectory.of(task)
    begin(job, "5_0.0")
    job.logs.mkdir()
    (job.logs / "5_0.0.log").write_text("of the task\n")
    assert job_logs.main([str(whole.folder.parent), "--task", "0"]) == 0
    assert capsys.readouterr().out == "of the task\n"


def test_a_task_is_known_by_its_own_folder(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`status` of a task names its folder, also before its first attempt has made one."""
    tasks = [{"run": str(tmp_path / "runs" / "sweep" / name), "overrides": {}} for name in "ab"]
    launch("sweep", tasks=tasks, job_id="7")
    first = JobDirectory.of(Path(tasks[0]["run"]))
    begin(first, "7_0.0")
    first.logs.mkdir()
    (first.logs / "7_0.0.log").write_text("said by a\n")
    assert job_logs.main([tasks[0]["run"]]) == 0
    assert capsys.readouterr().out == "said by a\n"
    Path(tasks[1]["run"]).mkdir()
    assert job_logs.main([tasks[1]["run"]]) == 1
    assert "no log yet" in capsys.readouterr().err


def test_following_goes_on_over_a_requeue_to_the_end(
    launch: Launch, capsys: pytest.CaptureFixture[str], living: subprocess.Popen[bytes]
) -> None:
    job = launch("teacher", way="local")
    job.logs.mkdir()

    def work() -> None:
        for number in (1, 2):
            attempt = f"local-{number}-{living.pid}"
            begin(job, attempt, ago=0, **local_fields(living.pid))
            log = job.logs / f"{attempt}.log"
            for part in ("half a ", "line\nÄ", "\n"):
                time.sleep(0.3)
                with log.open("a", encoding="utf-8") as file:
                    file.write(part)
            if number == 1:
                # Preempted; what SLURM would say of the job meanwhile, the next attempt says here.
                continue
            job.leave_word("DONE", attempt=attempt, step=5, reason="finished")
            job.end(attempt, step=5, word="DONE", reason="finished")

    worker = threading.Thread(target=work)
    worker.start()
    begun = time.monotonic()
    while not job.attempts.exists():
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    assert job_logs.main([str(job.folder.parent), "-f"]) == 0
    worker.join()
    printed = capsys.readouterr()
    assert printed.out == "half a line\nÄ\n" * 2
    assert "--- attempt local-2" in printed.err
    assert "--- DONE: finished at step 5" in printed.err


def test_ctrl_c_ends_following_quietly(launch: Launch) -> None:
    job = started(launch)
    command = [sys.executable, "-m", "launch.cli", "logs", "-f", str(job.folder.parent)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "first\n"
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert "Traceback" not in err


def test_a_reader_that_has_had_enough(launch: Launch) -> None:
    job = started(launch)
    (job.logs / "local-1-1.log").write_text("a long line of the log\n" * 100_000)
    command = [sys.executable, "-m", "launch.cli", "logs", str(job.folder.parent)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as printer:
        assert printer.stdout is not None
        assert printer.stderr is not None
        printer.stdout.readline()
        printer.stdout.close()
        assert printer.stderr.read() == ""
    assert printer.returncode == 0
