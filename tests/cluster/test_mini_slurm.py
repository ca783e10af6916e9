"""The test cluster is a cluster: nodes of their own that can lose power and network."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.cluster import SCRIPT, Cluster

PYTHON = sys.executable


def test_nodes_have_names_networks_and_processes_of_their_own(shared_cluster: Cluster) -> None:
    names = shared_cluster.run("srun", "-N2", "-n2", "hostname").stdout.split()
    assert sorted(names) == ["node1", "node2"]
    # The same port on both nodes, held long enough to meet.
    listen = "import socket, time; s = socket.create_server(('', 29500)); print(s.getsockname()[1]); time.sleep(1)"
    assert shared_cluster.run("srun", "-N2", "-n2", PYTHON, "-c", listen).stdout.split() == ["29500", "29500"]
    assert "node2" in shared_cluster.exec_on("node1", "getent", "hosts", "node2")


@pytest.mark.slow
def test_a_dead_node_is_noticed_and_its_job_requeued(cluster: Cluster, tmp_path: Path) -> None:
    step = f"""srun bash -c 'touch "{tmp_path}/begun-$SLURM_NODEID"; sleep 120'"""
    job = cluster.sbatch("-N2", "-o", "/dev/null", "--wrap", step)
    # A node that dies before the step has come to it fails the step, and with it the job.
    cluster.wait_until(lambda: len(list(tmp_path.glob("begun-*"))) == 2, "the step is on both nodes")
    cluster.kill_node("node2")
    assert cluster.wait_for_requeue(job).restarts == 1
    cluster.boot_node("node2")
    cluster.release(job)
    cluster.wait_for_state(job, "RUNNING")


def test_a_cut_node_lives_on_unheard(cluster: Cluster) -> None:
    cluster.cut_node("node2")
    reach = ["python3", "-c", "import socket; socket.create_connection(('node2', 1), timeout=2)"]
    assert "timed out" in _failure(cluster, "node1", reach)
    assert cluster.exec_on("node2", "hostname").strip() == "node2"
    cluster.heal_node("node2")
    cluster.wait_until(lambda: "refused" in _failure(cluster, "node1", reach), "node2 answers again")


def test_clusters_that_start_together_do_not_meet(can_cluster: None, tmp_path: Path) -> None:
    clusters = [Cluster(tmp_path / f"c{number}", nodes=1) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        try:
            list(pool.map(Cluster.__enter__, clusters))
            addresses = {one.exec_on("node1", "cat", one.folder / "hosts") for one in clusters}
            assert len(addresses) == 3
            for one in clusters:
                assert one.run("srun", "hostname").stdout == "node1\n"
        finally:
            list(pool.map(Cluster.__exit__, clusters))
    assert not any(one.folder.exists() for one in clusters)


def test_nothing_outlives_the_process_it_was_started_for(can_cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    owner = subprocess.Popen(["sleep", "300"])
    cluster = Cluster(folder, nodes=1)
    subprocess.run([SCRIPT, "start", "-d", folder, "-n", "1", "--with", str(owner.pid)], check=True, timeout=120)
    cluster.exec_on("node1", "true")
    owner.kill()
    owner.wait()
    cluster.wait_until(lambda: not folder.exists(), "the cluster is gone")


def test_without_namespaces_nodes_share_the_host(can_cluster: None, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    subprocess.run([SCRIPT, "start", "-d", cluster.folder, "--mode", "ports"], check=True, timeout=120)
    try:
        nodes = cluster.run("srun", "-N2", "-n2", "printenv", "SLURMD_NODENAME").stdout.split()
        assert sorted(nodes) == ["node1", "node2"]
    finally:
        cluster.__exit__()


def _failure(cluster: Cluster, node: str, command: list[str]) -> str:
    try:
        return cluster.exec_on(node, *command)
    except AssertionError as error:
        return str(error)
