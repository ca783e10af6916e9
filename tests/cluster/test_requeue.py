"""Jobs that lose their place or their time go on where they were, and end with every step done once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import stub
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import StubJob
from trainer.job.directory import read_lines

BRIEF = ["--step_seconds", "0.02"]


def test_an_undisturbed_job_takes_one_attempt(shared_cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(shared_cluster, tmp_path / "undisturbed", options=["--time", "20"]) as job:
        job.wait_for_step()
        job.finish()
        job.check_complete()
        assert job.words() == ["DONE"]
        # The ranks know when their time is over; the minute is for a start on busy cores.
        end_time = float(str(stub.saves(job.run)[0]["end_time"]))
        assert abs(end_time - job.job.history()[0].began - 20 * 60) < 60


def test_preempted_by_a_job_of_higher_priority(cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(cluster, tmp_path / "run", options=["--partition", "low"]) as job:
        job.wait_for_step()
        other = cluster.sbatch("--partition=high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        cluster.wait_for_state(other, "COMPLETED")
        job.finish()
        job.check_complete()
        # The ranks were asked, saved at a step of their own choice, and left before the grace was over.
        assert job.words() == ["RESUME", "DONE"]


@pytest.mark.slow
def test_the_time_limit_hit_twice(shared_cluster: Cluster, tmp_path: Path) -> None:
    # A warning 59 s before the end of a minute: SLURM gives it as soon as it looks at the job.
    with StubJob(shared_cluster, tmp_path / "limited", sbatch=["--time=1", "--signal=B:USR2@59"]) as job:
        for attempt in (1, 2):
            job.wait_for_step(attempt)
            shared_cluster.wait_for_requeue(job.job_id)
            assert job.words() == ["RESUME"] * attempt
            shared_cluster.release(job.job_id)
        job.finish()
        job.check_complete()
        assert "SIGUSR2" in job.output()


@pytest.mark.slow
def test_ranks_that_do_not_leave_before_the_time_limit(shared_cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(shared_cluster, tmp_path / "deaf", stub_options=["--deaf"], sbatch=["--time=1"]) as job:
        job.wait_for_step()
        shared_cluster.wait_for_requeue(job.job_id, timeout=240)
        assert job.job.stop.exists()
        assert "did not save and leave in time" in str(job.job.history()[0].reason)
        job.finish()
        job.check_complete()
        assert job.words() == [None, "DONE"]


def test_a_time_limit_that_somebody_moves(shared_cluster: Cluster, tmp_path: Path) -> None:
    """The ranks hear of it, and the director does not give them up at the old one."""

    def ends_after(minutes: float) -> bool:
        end_time = stub.saves(job.run)[-1]["end_time"]
        return end_time is not None and abs(float(str(end_time)) - began - minutes * 60) < 30

    with StubJob(shared_cluster, tmp_path / "moved", nodes=1, sbatch=["--time=3", "--signal=B:USR2@10"]) as job:
        job.wait_for_step()
        began = job.job.history()[0].began
        assert ends_after(3)
        for minutes in (2, 9):
            shared_cluster.run("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={minutes}")
            shared_cluster.wait_until(lambda m=minutes: ends_after(m), f"the ranks know of {minutes} minutes")  # type: ignore[misc]
        job.finish()
        job.check_complete()
        assert job.output().count("by what SLURM says now; telling the ranks") == 2


def test_warned_twice_of_the_time_limit(shared_cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(shared_cluster, tmp_path / "warned") as job:
        for attempt in (1, 2):
            job.wait_for_step(attempt)
            job.warn()
            shared_cluster.wait_for_requeue(job.job_id)
            shared_cluster.release(job.job_id)
        job.finish()
        job.check_complete()
        assert job.words() == ["RESUME", "RESUME", "DONE"]


@pytest.mark.parametrize("name", ["", "name"])
def test_where_requeue_is_forbidden_the_job_is_submitted_anew(
    shared_cluster: Cluster, tmp_path: Path, name: str
) -> None:
    named = ["--name", name] if name else []
    with StubJob(shared_cluster, tmp_path / "anew", options=["--no_requeue", *named]) as job:
        job.wait_for_step()
        job.warn()
        shared_cluster.wait_until(lambda: len(job.submissions()) == 2, "a second submission")
        job.finish(job.submissions()[1])
        job.check_complete()
        assert job.words() == ["RESUME", "DONE"]
        assert read_lines(job.job.submissions)[1]["after"] == ([f"afterany:{job.job_id}"] if name else ["singleton"])


def test_submitted_anew_a_job_stays_away_from_the_same_nodes(shared_cluster: Cluster, tmp_path: Path) -> None:
    # As after a check of the nodes: known to SLURM alone, and not to the script.
    with StubJob(
        shared_cluster, tmp_path / "away", nodes=1, options=["--no_requeue"], sbatch=["--exclude=node2"]
    ) as job:
        job.wait_for_step()
        job.warn()
        shared_cluster.wait_until(lambda: len(job.submissions()) == 2, "a second submission")
        again = shared_cluster.run("scontrol", "--oneliner", "show", "job", job.submissions()[1]).stdout
        assert "ExcNodeList=node2 " in again


@pytest.mark.slow
def test_attempts_that_save_steps_are_never_too_many(shared_cluster: Cluster, tmp_path: Path) -> None:
    # Each attempt fails after 12 steps, of which it saved 10.
    with StubJob(
        shared_cluster,
        tmp_path / "progress",
        stub_options=["--steps", "30", "--fail_after", "12", *BRIEF],
        options=["--max_attempts_without_progress", "1"],
    ) as job:
        assert shared_cluster.wait_for_end(job.job_id).state == "COMPLETED"
        job.check_complete()
        assert job.words() == [None, None, "DONE"]


def test_attempts_without_progress_end_with_the_reason(shared_cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(
        shared_cluster,
        tmp_path / "stuck",
        stub_options=["--fail_after", "3", *BRIEF],
        options=["--max_attempts_without_progress", "2"],
    ) as job:
        assert shared_cluster.wait_for_end(job.job_id).state == "FAILED"
        word = job.job.last_word()
        assert word is not None
        assert word.word == "FAILED"
        assert "2 attempts in a row made no progress (no step is saved)" in word.reason
        assert "this attempt fails after 3 steps" in word.reason
        assert job.words() == [None, "FAILED"]


def test_a_mistake_of_the_user_is_not_tried_again(shared_cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(shared_cluster, tmp_path / "mistake", stub_options=["--mistake", "glosses.csv: not there"]) as job:
        assert shared_cluster.wait_for_end(job.job_id, releasing=False).state == "FAILED"
        word = job.job.last_word()
        assert word is not None
        assert (word.word, word.reason) == ("FAILED", "glosses.csv: not there")
        assert job.words() == ["FAILED"]


@pytest.mark.parametrize("how", ["cancel", "scancel"])
def test_a_cancelled_job_does_not_come_back(shared_cluster: Cluster, tmp_path: Path, how: str) -> None:
    with StubJob(shared_cluster, tmp_path / f"the {how}led") as job:
        job.wait_for_step()
        if how == "scancel":
            shared_cluster.run("scancel", job.job_id)
        else:
            job.job.cancel("cancelled by a test")
        end = shared_cluster.wait_for_end(job.job_id, releasing=False)
        assert (end.state, end.restarts) == ("CANCELLED" if how == "scancel" else "FAILED", 0), job.output()
        assert str(job.job.history()[0].reason).startswith("stopped on request: ")
