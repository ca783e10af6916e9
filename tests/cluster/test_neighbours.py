"""Jobs beside one another on the same nodes, and the tasks of an array, keep to themselves."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import StubJob


def test_two_jobs_at_once_on_the_same_nodes(shared_cluster: Cluster, tmp_path: Path) -> None:
    with (
        StubJob(shared_cluster, tmp_path / "neighbour") as one,
        StubJob(shared_cluster, tmp_path / "other neighbour") as other,
    ):
        for job in (one, other):
            job.wait_for_step()
        assert [shared_cluster.job(job.job_id).nodes for job in (one, other)] == ["node[1-2]"] * 2
        for job in (one, other):
            job.finish()
            job.check_complete()
            assert job.words() == ["DONE"]


def test_a_task_of_an_array_is_requeued_alone(shared_cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(shared_cluster, tmp_path / "array", tasks=2) as job:
        runs = [job.run / "0", job.run / "1"]
        for run in runs:
            job.wait_for_step(1, run)
        job.warn(f"{job.job_id}_1")
        shared_cluster.wait_for_requeue(f"{job.job_id}_1")
        for task in (1, 0):
            job.finish(f"{job.job_id}_{task}", runs[task])
            job.check_complete(runs[task])
        assert (job.words(runs[0]), job.words(runs[1])) == (["DONE"], ["RESUME", "DONE"])
