"""A node that loses power or network takes its job to other nodes; nothing of what it still computes is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import stub
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import StubJob

THREE = pytest.mark.parametrize("cluster", [{"nodes": 3}], indirect=True)


@THREE
def test_power_cut(cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(cluster, tmp_path / "run") as job:
        job.wait_for_step()
        lost = other_node(cluster, job)
        cluster.kill_node(lost)
        cluster.wait_for_requeue(job.job_id)
        job.finish()
        job.check_complete()
        assert lost not in cluster.run("scontrol", "show", "hostnames", cluster.job(job.job_id).nodes).stdout
        first, second = job.job.history()
        assert (first.word, second.word) == (None, "DONE")
        assert "its node failed" in str(first.reason)


@pytest.mark.slow
@THREE
def test_power_cut_of_the_node_that_leads(cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(cluster, tmp_path / "run") as job:
        job.wait_for_step()
        cluster.kill_node(cluster.job(job.job_id).batch_host)
        cluster.wait_for_requeue(job.job_id)
        job.finish()
        job.check_complete()
        assert job.words() == [None, "DONE"]


def test_network_cut_of_a_job_that_lives_on(cluster: Cluster, tmp_path: Path) -> None:
    # A job of one node: cut off, its ranks still have one another, and train and save as before.
    with StubJob(cluster, tmp_path / "run", nodes=1) as job:
        job.wait_for_step()
        cut = cluster.job(job.job_id).batch_host
        cluster.cut_node(cut)
        cluster.wait_for_requeue(job.job_id)
        before = job.saved()
        # Nobody has taken over yet, so that what the old ranks do is still right.
        cluster.wait_until(lambda: job.saved() > before, "the old ranks save one more step")
        cluster.release(job.job_id)
        cluster.wait_until(lambda: not all(save["published"] for save in stub.saves(job.run)), "a refusal")
        job.wait_for_step(2)
        job.finish()
        job.check_complete()
        first, second = job.job.history()
        late = [
            save for save in stub.saves(job.run) if save["attempt"] == first.attempt and save["time"] > second.began
        ]
        assert late
        assert not any(save["published"] for save in late)
        cluster.heal_node(cut)
        assert cluster.job(job.job_id).state == "COMPLETED"


@pytest.mark.slow
@THREE
def test_network_cut_between_the_nodes_of_a_job(cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(cluster, tmp_path / "run") as job:
        job.wait_for_step()
        cut = other_node(cluster, job)
        cluster.cut_node(cut)
        cluster.wait_for_requeue(job.job_id)
        cluster.release(job.job_id)
        job.wait_for_step(2)
        # The old ranks are still there, and come back into the network beside the new ones.
        assert "tests.cluster.stub" in cluster.exec_on(cut, "ps", "axww")
        cluster.heal_node(cut)
        job.finish()
        job.check_complete()
        assert job.words() == [None, "DONE"]


def test_a_node_that_reboots_faster_than_slurm_notices(cluster: Cluster, tmp_path: Path) -> None:
    with StubJob(cluster, tmp_path / "run") as job:
        job.wait_for_step()
        node = other_node(cluster, job)
        cluster.kill_node(node)
        cluster.boot_node(node)
        cluster.wait_for_requeue(job.job_id)
        job.finish()
        job.check_complete()
        assert job.words() == [None, "DONE"]


def other_node(cluster: Cluster, job: StubJob) -> str:
    """Name a node of the job on which its script does not run."""
    state = cluster.job(job.job_id)
    nodes = cluster.run("scontrol", "show", "hostnames", state.nodes).stdout.split()
    return next(node for node in nodes if node != state.batch_host)
