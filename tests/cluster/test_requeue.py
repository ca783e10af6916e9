"""Jobs that lose their place or their time go on where they were, and end with every step done once."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import StubJob


def test_an_undisturbed_job_takes_one_attempt(shared_cluster: Cluster, tmp_path: Path) -> None:
    job = StubJob(shared_cluster, tmp_path / "run")
    assert shared_cluster.wait_for_end(job.job_id).state == "COMPLETED"
    job.check_complete(20)
    assert [record.word for record in job.job.history()] == ["DONE"]


def test_preempted_by_a_job_of_higher_priority(cluster: Cluster, tmp_path: Path) -> None:
    job = StubJob(cluster, tmp_path / "run", arguments=["--steps", "40"], sbatch=["--partition=low"])
    job.wait_for_step(5)
    other = cluster.sbatch("--partition=high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    cluster.wait_for_state(other, "COMPLETED")
    end = cluster.wait_for_end(job.job_id)
    assert (end.state, end.restarts) == ("COMPLETED", 1), job.output()
    job.check_complete(40)
    # The ranks were asked, saved at a step of their own choice, and left before the grace was over.
    assert [record.word for record in job.job.history()] == ["RESUME", "DONE"]
