"""A node that is not fit is found before the ranks start, and the job goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import StubJob


@pytest.mark.parametrize("cluster", [{"nodes": 3}], indirect=True)
def test_a_job_goes_on_without_an_unfit_node(cluster: Cluster, tmp_path: Path) -> None:
    cluster.exec_on("node2", "mount", "-o", "remount,size=64k", "/dev/shm")
    with StubJob(cluster, tmp_path / "run", options=["--preflight"]) as job:
        assert cluster.wait_for_requeue(job.job_id).restarts == 1
        assert job.saved() == 0
        job.finish()
        job.check_complete()
        assert cluster.job(job.job_id).nodes == "node[1,3]"
        first, second = job.job.history()
        assert (first.word, second.word) == (None, "DONE")
        assert "shared memory" in str(first.reason)
        assert str(first.reason).endswith("going on without node2")
