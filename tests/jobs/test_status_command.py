"""`signscale status` and `jobs`: what a run's files tell, in every state a run can be in, without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import job_list, job_status
from launch.jobs.judging import Verdict
from launch.jobs.report import RunReport, foresee, report_run
from launch.jobs.traces import Progress, read_progress
from launch.slurm.squeue import QueuedJob
from tests.jobs.conftest import begin, local_fields
from trainer.errors import InputError
from trainer.job.directory import JobDirectory

Launch = Callable[..., JobDirectory]


def status(directory: JobDirectory) -> RunReport:
    return report_run(directory.folder.parent)


def train(run: Path, *, step: int, wer: float = 41.5) -> None:
    """Leave what training leaves: metrics, the last line of them cut short, and a checkpoint."""
    (run / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    (run / "checkpoints" / "last.json").write_text(json.dumps({"checkpoint": f"step-{step:09d}", "value": None}))
    lines = [{"step": step - 1, "epoch": 1, "val/wer": wer}, {"step": step, "epoch": 2, "train/loss": 3.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')


def test_a_finished_job(launch: Launch) -> None:
    job = launch("teacher", job_id="7")
    begin(job, "7.0")
    train(job.folder.parent, step=40)
    job.leave_word("RESUME", attempt="7.0", step=40, reason="preempted")
    job.end("7.0", step=40, word="RESUME", reason="preempted")
    begin(job, "7.1", ago=30)
    job.leave_word("DONE", attempt="7.1", step=90, reason="finished")
    job.end("7.1", step=90, word="DONE", reason="finished")
    report = status(job)
    assert report.state == "DONE"
    assert report.progress is not None
    assert (report.progress.saved, report.progress.metrics["val/wer"]) == (40, 41.5)
    text = job_status.format_report(report, time.time())
    assert "0 to 40" in text
    assert "40 to 90" in text
    assert "RESUME: preempted" in text
    assert "dev WER 41.50 %" in text
    assert "signscale evaluate --checkpoint" in text


def test_done_without_reaching_the_target_says_so(launch: Launch) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", **local_fields(os.getpid()))
    job.leave_word("DONE", attempt="local-1-1", step=9, reason="target WER 20 % NOT reached", code=1)
    assert "not as well as was asked for" in status(job).why


def test_a_failed_job_shows_its_reason_and_the_end_of_its_log(launch: Launch) -> None:
    job = launch("teacher", job_id="7")
    begin(job, "7.0")
    job.logs.mkdir()
    (job.logs / "7.0.log").write_text("".join(f"line {number}\n" for number in range(30)))
    job.leave_word("FAILED", attempt="7.0", step=None, reason="annotations/train.csv:3: no glosses")
    job.end("7.0", step=None, word="FAILED", reason="annotations/train.csv:3: no glosses")
    report = status(job)
    assert report.state == "FAILED"
    assert "annotations/train.csv:3" in report.why
    assert report.last_lines[-1] == "line 29"
    assert len(report.last_lines) == 12
    assert report.next[-1].startswith("signscale launch slurm -- train --config '/a folder/recipe.yaml'")


def test_a_saved_run_can_be_gone_on_with(launch: Launch) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", **local_fields(1))
    job.leave_word("RESUME", attempt="local-1-1", step=12, reason="stopped on request")
    job.end("local-1-1", step=12, word="RESUME", reason="stopped on request")
    report = status(job)
    assert (report.state, report.job) == ("STOPPED", None)
    assert report.next[0].startswith("signscale launch local --processes=2 -- train")


def test_without_slurm_an_open_end_is_not_guessed(launch: Launch) -> None:
    job = launch("teacher", job_id="7")
    begin(job, "7.0")
    report = status(job)
    assert report.state == "UNKNOWN"
    assert "squeue is not on the PATH" in report.why
    assert "attempt 7.0 began" in report.why


def test_a_controller_that_does_not_answer(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_slurm: Path
) -> None:
    squeue = Path("/usr/bin/squeue")
    if not squeue.exists():
        pytest.skip("SLURM's tools are not installed")
    # Nothing listens on port 1.
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nAuthType=auth/none\nMessageTimeout=1\n"
        "NodeName=node1\nPartitionName=main Nodes=node1\n"
    )
    (no_slurm / "squeue").symlink_to(squeue)
    monkeypatch.setenv("SLURM_CONF", str(conf))
    job = launch("teacher", job_id="7")
    assert "SLURM's controller does not answer (job 7)" in status(job).why
    done = launch("student", job_id="8")
    begin(done, "8.0")
    done.leave_word("DONE", attempt="8.0", step=5, reason="finished")
    report = status(done)
    assert report.state == "DONE"
    assert "own files" in report.notes[0]


def test_a_machine_without_a_cluster_says_where_to_ask(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, no_slurm: Path
) -> None:
    if not Path("/usr/bin/squeue").exists() or list(Path("/etc").glob("slurm*/slurm.conf")):
        pytest.skip("SLURM's tools are not installed, or know a cluster")
    (no_slurm / "squeue").symlink_to("/usr/bin/squeue")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    assert "login node" in status(launch("teacher", job_id="7")).why


def test_a_local_run_is_known_by_its_process(launch: Launch, living: subprocess.Popen[bytes]) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", ago=0, **local_fields(living.pid))
    assert status(job).state == "RUNNING"
    job.request_stop("asked")
    assert status(job).state == "STOPPING"
    living.kill()
    living.wait()
    report = status(job)
    assert report.state == "LOST"
    assert "killed" in report.why


def test_a_number_that_another_process_got_is_not_the_run(launch: Launch, living: subprocess.Popen[bytes]) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", ago=3600, **local_fields(living.pid))
    assert status(job).state == "LOST"


def test_a_process_of_another_machine_is_left_open(launch: Launch) -> None:
    job = launch("teacher", way="local")
    begin(job, "local-1-1", host="somewhere-else", pid=1)
    report = status(job)
    assert report.state == "UNKNOWN"
    assert "process 1 on somewhere-else" in report.why


def test_a_plain_run_tells_by_its_files(tmp_path: Path) -> None:
    run = tmp_path / "plain"
    run.mkdir()
    (run / "recipe.yaml").write_text("output_dir: plain\n")
    train(run, step=20)
    report = report_run(run)
    assert (report.state, report.way) == ("NOT LAUNCHED", None)
    assert report.progress is not None
    assert (report.progress.step, report.progress.saved) == (20, 20)


def test_pace_counts_from_the_attempts_beginning_and_later_from_its_first_save(launch: Launch) -> None:
    job = launch("teacher")
    run, log = job.folder.parent, job.logs / "7.1.log"
    attempt = begin(job, "7.1", ago=100)
    job.logs.mkdir()
    log.write_text("0: [default0]:step 50/150 epoch 1  loss 2.0\n")
    progress = read_progress(run, attempt, log, first_step=20)
    assert (progress.step, progress.total) == (50, 150)
    assert progress.steps_per_second == pytest.approx(0.3, rel=0.2)
    saved = run / "checkpoints" / "step-000000030"
    saved.mkdir(parents=True)
    os.utime(saved, (time.time() - 10, time.time() - 10))
    assert read_progress(run, attempt, log, first_step=20).steps_per_second == pytest.approx(2.0, rel=0.3)


def test_outlook_against_the_time_limit() -> None:
    now = 1_000_000.0
    progress = Progress(step=50, total=150, steps_per_second=0.5, metrics={})

    def outlook(left: float) -> str | None:
        job = QueuedJob(job_id="7", base="7", task=None, state="RUNNING", end=now + left, limit=60.0)
        return foresee(Verdict(state="RUNNING", why="", job=job), progress, now)

    assert "about 3 min 20 s to go" in (before := outlook(300) or "")
    assert "before the time limit" in before
    assert "after the time limit" in (late := outlook(10) or "")
    assert "4 more times" in late
    assert foresee(Verdict(state="STOPPED", why=""), progress, now) is None


def test_no_run_at_all(tmp_path: Path, launch: Launch) -> None:
    with pytest.raises(InputError, match="is no run"):
        job_status.main([str(tmp_path)])
    with pytest.raises(InputError, match="expected the folder of a run, found nothing"):
        job_status.main([str(tmp_path / "nowhere")])
    job = launch("teacher")
    with pytest.raises(InputError, match=f"did you mean {job.folder.parent}"):
        job_status.main([str(job.folder)])


def test_an_array_has_a_line_per_task(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [{"run": str(tmp_path / "runs" / "sweep" / str(n)), "overrides": {"dropout": n / 10}} for n in range(3)]
    whole = launch("sweep", way="local", tasks=tasks)
    first, second = (JobDirectory.of(Path(task["run"])) for task in tasks[:2])
    begin(first, "5_0.0", job_id=None)
    first.leave_word("DONE", attempt="5_0.0", step=3, reason="finished")
    begin(second, "5_1.0", job_id=None)
    second.leave_word("FAILED", attempt="5_1.0", step=1, reason="loss is not finite")
    # A task that failed before its own run was there.
    begin(whole, "5_2.0")
    whole.leave_word("FAILED", attempt="5_2.0", step=None, reason="no interpreter")
    assert job_status.main([str(whole.folder.parent)]) == 0
    text = capsys.readouterr().out
    assert "3 tasks: 2 FAILED, 1 DONE" in text
    assert "dropout=0.1" in text
    assert "no interpreter" in text
    assert job_list.main([str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert listed.count("loss is not finite") == 1, "a task is shown once, below its array"


def test_json_is_complete(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    job = launch("teacher", job_id="7")
    begin(job, "7.0")
    assert job_status.main([str(job.folder.parent), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["state"], report["job_ids"], report["attempts"][0]["attempt"]) == ("UNKNOWN", ["7"], "7.0")


def test_jobs_lists_what_can_be_read_and_names_what_cannot(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = launch("good", way="local")
    begin(good, "local-1-1", **local_fields(1))
    good.leave_word("DONE", attempt="local-1-1", step=3, reason="finished")
    broken = launch("broken", way="local")
    broken.plan.write_text("{half")
    launch("lines", job_id="9").submissions.write_text('{"time": 1}\n')
    (tmp_path / "runs" / "fresh" / "job").mkdir(parents=True)
    (tmp_path / "runs" / "unrelated" / "job" / "advert").mkdir(parents=True)
    assert job_list.main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "good" in printed.out
    assert "PREPARING" in printed.out
    assert "unrelated" not in printed.out
    assert str(broken.plan) in printed.err
    assert "submissions.jsonl:1" in printed.err


def test_jobs_stays_inside_and_out_of_what_runs_hold(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = launch("outside", way="local")
    inside = tmp_path / "inside"
    for place in ("run/job/snapshot/other", "run/checkpoints/other", "run/.hidden"):
        (inside / place).mkdir(parents=True)
        (inside / place / "recipe.yaml").write_text("")
    (inside / "run" / "evaluation-job-dev" / "job").mkdir(parents=True)
    (inside / "link").symlink_to(outside.folder.parent)
    assert job_list.main([str(inside)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PREPARING") == 2
    assert "link" not in printed
    assert "other" not in printed


def test_jobs_names_a_folder_it_may_not_read(tmp_path: Path, launch: Launch) -> None:
    job = launch("good", way="local")
    closed = tmp_path / "runs" / "closed"
    closed.mkdir(mode=0)
    # root may read everything; the current folder needs no way to it, which is this user's alone.
    code = (
        "import os, sys, launch.jobs.options; from launch.job_list import main\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main(['.']))"
    )
    for folder in (tmp_path / "runs", job.folder.parent, job.folder):
        folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "runs", capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "error: closed/job: cannot be read (Permission denied)" in done.stderr
    assert "good" in done.stdout


def test_jobs_of_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job_list.main([str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected a folder, found nothing"):
        job_list.main([str(tmp_path / "nowhere")])
