"""Jobs that lose their place or their time go on where they were, and end with every step done once."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import StubJob


def test_an_undisturbed_job_takes_one_attempt(shared_cluster: Cluster, tmp_path: Path) -> None:
    job = StubJob(shared_cluster, tmp_path / "undisturbed")
    job.wait_for_end()
    job.check_complete(20)
    assert job.words() == ["DONE"]


def test_preempted_by_a_job_of_higher_priority(cluster: Cluster, tmp_path: Path) -> None:
    job = StubJob(cluster, tmp_path / "run", stub_options=["--steps", "40"], options=["--partition", "low"])
    job.wait_for_step(5)
    other = cluster.sbatch("--partition=high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    cluster.wait_for_state(other, "COMPLETED")
    job.wait_for_end()
    job.check_complete(40)
    # The ranks were asked, saved at a step of their own choice, and left before the grace was over.
    assert job.words() == ["RESUME", "DONE"]
