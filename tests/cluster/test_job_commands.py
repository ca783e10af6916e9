"""jobs, status, logs and cancel against a real SLURM: what it says of a job in each of its states, and its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch import cli
from tests.cluster.cluster import ENDED, ROOT, Cluster
from tests.cluster.jobs import StubJob
from trainer.job.directory import JobDirectory

Signscale = Callable[..., str]
Start = Callable[..., StubJob]
OFTEN = ["--save_every", "2"]


@pytest.fixture
def start(shared_cluster: Cluster) -> Iterator[Start]:
    """Start jobs of the stub trainer, which end with the test."""
    with ExitStack() as jobs:
        yield lambda run, **options: jobs.enter_context(StubJob(shared_cluster, run, **options))


@pytest.fixture
def signscale(
    shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command on the login node, in this process, and return all it says."""
    for name in set(os.environ) - set(shared_cluster.env()):
        monkeypatch.delenv(name)
    for name, value in shared_cluster.env().items():
        monkeypatch.setenv(name, value)

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        code = cli.run([str(word) for word in words])
        printed = capsys.readouterr()
        assert code == 0, printed
        return printed.out + printed.err

    return run


def test_a_running_job_is_listed_read_and_ended_with_a_save(
    shared_cluster: Cluster, signscale: Signscale, start: Start, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    job = start(runs / "teacher", stub_options=OFTEN)
    job.wait_for_step()
    listed = signscale("jobs", runs)
    assert "RUNNING" in listed
    assert f"job {job.job_id} on node[1-2]" in listed
    told = signscale("status", job.run)
    assert f"{job.job_id}.0" in told
    assert "saved at step" in told
    assert "rank 0 of 4" in signscale("logs", job.run)
    ended = signscale("cancel", job.run)
    assert "asked to save and leave" in ended
    assert "CANCELLED" in ended
    shared_cluster.wait_for_state(job.job_id, *ENDED)
    assert shared_cluster.job(job.job_id).restarts == 0
    (attempt,) = job.job.history()
    assert (attempt.word, attempt.step) == ("RESUME", job.saved())
    assert "nothing to cancel" in signscale("cancel", job.run)


def test_what_will_not_save_is_ended_at_once(
    shared_cluster: Cluster, signscale: Signscale, start: Start, tmp_path: Path
) -> None:
    job = start(tmp_path / "teacher", nodes=1, ranks_per_node=1, stub_options=[*OFTEN, "--step_seconds", "0.2"])
    job.wait_for_step()
    said = signscale("cancel", job.run, "--now")
    assert f"job {job.job_id}: ended at once" in said
    assert shared_cluster.wait_for_state(job.job_id, *ENDED).state == "CANCELLED"
    assert json.loads(signscale("status", job.run, "--json"))["state"] == "CANCELLED"
    assert job.job.history()[-1].ended is not None


def test_jobs_that_wait_say_why_and_leave_the_queue(
    shared_cluster: Cluster, signscale: Signscale, start: Start, tmp_path: Path
) -> None:
    held = start(tmp_path / "held", sbatch=["--hold"])
    later = start(tmp_path / "later", sbatch=["--begin=now+1hour"])
    told = signscale("status", held.run)
    assert "HELD" in told
    assert f"scontrol release {held.job_id}" in told
    told = signscale("status", later.run)
    assert "QUEUED" in told
    assert "starts about" in told
    for job in (held, later):
        assert f"job {job.job_id}: taken out of the queue" in signscale("cancel", job.run)
        assert shared_cluster.job(job.job_id).state == "CANCELLED"
    listed = signscale("jobs", tmp_path)
    assert listed.count("CANCELLED") == 2
    assert listed.count("before it began") == 2


def test_a_requeued_job_is_followed_to_its_end(
    shared_cluster: Cluster, signscale: Signscale, start: Start, tmp_path: Path
) -> None:
    job = start(tmp_path / "teacher")
    job.wait_for_step()
    command = [sys.executable, "-m", "launch.cli", "logs", "-f", str(job.run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=shared_cluster.env(), text=True, **pipes) as follower:  # type: ignore[call-overload]
        job.job.request_stop("asked by a test")
        shared_cluster.wait_for_requeue(job.job_id)
        told = signscale("status", job.run)
        assert "REQUEUED" in told
        assert "two minutes" in told
        job.finish()
        out, err = follower.communicate(timeout=90)
    assert follower.returncode == 0, err
    assert out.count("rank 0 of 4") == 2, out + err
    assert f"--- attempt {job.job_id}.1" in err
    assert err.splitlines()[-1].startswith("--- DONE: finished at step")


def test_a_requeued_job_is_taken_out_of_the_queue(
    shared_cluster: Cluster, signscale: Signscale, start: Start, tmp_path: Path
) -> None:
    job = start(tmp_path / "teacher", nodes=1, ranks_per_node=1, stub_options=OFTEN)
    job.wait_for_step()
    job.job.request_stop("asked by a test")
    shared_cluster.wait_for_requeue(job.job_id)
    said = signscale("cancel", job.run)
    assert "taken out of the queue" in said
    assert "CANCELLED" in said
    assert shared_cluster.job(job.job_id).state == "CANCELLED"


def test_one_task_of_an_array_is_ended_alone(
    shared_cluster: Cluster, signscale: Signscale, start: Start, tmp_path: Path
) -> None:
    job = start(tmp_path / "sweep", nodes=1, ranks_per_node=1, tasks=2, stub_options=OFTEN)
    for task in ("0", "1"):
        job.wait_for_step(run=job.run / task)
    told = signscale("status", job.run)
    assert "2 tasks: 2 RUNNING" in told
    signscale("cancel", job.run, "--task", "1")
    report = json.loads(signscale("status", job.run, "--json"))
    assert [report["state"], *(task["state"] for task in report["tasks"])] == ["RUNNING", "RUNNING", "CANCELLED"]
    assert "sweep" in (listed := signscale("jobs", tmp_path))
    assert len(listed.splitlines()) - listed.splitlines().count("") == 4, "the array, and its tasks below it"
    signscale("cancel", job.run)
    assert "2 tasks: 2 CANCELLED" in signscale("status", job.run)
    assert all(record.word == "RESUME" for task in "01" for record in JobDirectory.of(job.run / task).history())


def test_a_strangers_job_is_never_cancelled(shared_cluster: Cluster, signscale: Signscale, tmp_path: Path) -> None:
    script = tmp_path / "other.sh"
    script.write_text("#!/bin/bash\nexec sleep 600\n")
    stranger = shared_cluster.sbatch("-o", "/dev/null", script)
    job = JobDirectory.of(tmp_path / "teacher")
    job.add_submission(stranger, cluster=None, after=[])
    told = signscale("status", tmp_path / "teacher")
    assert f"job {stranger} is not this run's: it runs {script}" in told
    assert "nothing to cancel" in signscale("cancel", tmp_path / "teacher", "--now")
    assert shared_cluster.job(stranger).state not in ENDED
    shared_cluster.run("scancel", stranger)


def test_a_child_says_which_parent_failed(
    shared_cluster: Cluster, signscale: Signscale, start: Start, tmp_path: Path
) -> None:
    parent = start(tmp_path / "parent", stub_options=["--mistake", "no corpus"])
    after = [f"--dependency=afterok:{parent.job_id}", "--kill-on-invalid-dep=yes"]
    child = start(tmp_path / "child", sbatch=after)
    child.job.add_submission(child.job_id, cluster=None, after=[f"afterok:{parent.job_id}"])
    shared_cluster.wait_for_state(child.job_id, "CANCELLED")
    told = signscale("status", child.run)
    assert "CANCELLED" in told
    assert "because a job before it failed" in told
    assert f"job {parent.job_id} ({parent.run}) FAILED" in told
    assert "no corpus" in signscale("status", parent.run)
