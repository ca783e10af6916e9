"""The doctor and its preflight on a real cluster: bad nodes are named while there is still nothing to lose."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.jobs.plan import Plan
from tests.cluster.cluster import Cluster

SHAPE = {"nodes": 3}


def save_plan(run: Path, *, launcher: Any = "plain") -> Plan:
    plan = Plan(
        way="slurm",
        name="preflight",
        run=run,
        command=("-m", "tests.cluster.stub"),
        module="tests.cluster.stub",
        arguments=(),
        interpreter=sys.executable,
        nodes=3,
        use_cpu=True,
        launcher=launcher,
        created=time.time(),
    )
    plan.save()
    return plan


def preflight(cluster: Cluster, plan: Plan, *options: str, prefix: str = "", timeout: float = 90) -> dict[str, Any]:
    """Start the preflight on all nodes as the director does, and return its verdict."""
    srun = ["srun", f"-N{plan.nodes}", f"-n{plan.nodes}", "--wait=60", "--overlap"]
    words = [sys.executable, "-m", "launch.doctor", "--preflight", "--job", str(plan.job.folder), *options]
    cluster.run(*srun, "sh", "-c", f'{prefix} exec "$@"', "sh", *words, timeout=timeout, SIGNSCALE_ATTEMPT="7.0")
    path = plan.job.folder / "preflight-7.0.json"
    found: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    shutil.rmtree(plan.job.folder / "preflight-7.0")
    return found


@pytest.mark.parametrize("cluster", [SHAPE], indirect=True)
def test_slow_short_and_hanging_nodes_are_excluded(cluster: Cluster, tmp_path: Path) -> None:
    plan = save_plan(tmp_path / "run")
    assert preflight(cluster, plan) == {"ok": True, "bad_nodes": [], "problems": []}
    # A node that hangs before it says a word.
    hang = '[ "$SLURMD_NODENAME" != node2 ] || exec sleep 15;'
    found = preflight(cluster, plan, "--patience", "12", prefix=hang)
    assert (found["ok"], found["bad_nodes"]) == (False, ["node2"])
    assert "node2 left nothing" in found["problems"][0]
    cluster.exec_on("node2", "mount", "-o", "remount,size=1M", "/dev/shm")
    found = preflight(cluster, plan)
    assert (found["ok"], found["bad_nodes"]) == (False, ["node2"])
    assert "shared memory" in found["problems"][0]
    cluster.exec_on("node2", "mount", "-o", "remount,size=1G", "/dev/shm")
    try:
        limit = ("rate", "40mbit", "burst", "32kbit", "latency", "400ms")
        cluster.exec_on("node3", "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
    except AssertionError as error:
        pytest.skip(f"this kernel makes no line slow: {error}")
    found = preflight(cluster, plan)
    assert (found["ok"], found["bad_nodes"]) == (False, ["node3"])
    assert "network: node3" in found["problems"][0]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [SHAPE], indirect=True)
def test_ranks_that_fail_on_one_node_exclude_it(cluster: Cluster, tmp_path: Path) -> None:
    plan = save_plan(tmp_path / "run", launcher="accelerate")
    assert preflight(cluster, plan, timeout=400) == {"ok": True, "bad_nodes": [], "problems": []}
    # torch cannot be loaded there.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    fault = f'[ "$SLURMD_NODENAME" != node3 ] || export PYTHONPATH={broken}:$PYTHONPATH;'
    found = preflight(cluster, plan, prefix=fault, timeout=400)
    assert (found["ok"], found["bad_nodes"]) == (False, ["node3"])
    assert "libcudart" in found["problems"][0]


@pytest.mark.slow
def test_the_nodes_of_a_job_are_looked_at_and_waited_for(shared_cluster: Cluster, tmp_path: Path) -> None:
    words = ["--on", "slurm", "--nodes", "2", "--ranks-per-node", "2", "--cpus_per_task", "1", "--mem", "500"]
    report = tmp_path / "report"
    command = [sys.executable, "-m", "launch.cli", "doctor", "--json", "--report", str(report), *words]
    done = shared_cluster.run(*command, timeout=500)
    found = json.loads(done.stdout)
    values = {one["check"]: one["value"] for one in found["findings"]}
    assert found["ok"]
    assert found["nodes"] == ["node1", "node2"]
    assert values["ranks"] == "4 on 2 node(s)"
    assert values["all-reduce"].startswith("gloo, 4 ranks, right at every size")
    assert "queued as job" in done.stderr


def test_what_sbatch_refuses_leaves_nothing(shared_cluster: Cluster, tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [sys.executable, "-m", "launch.cli", "doctor", "--report", str(report), "--on", "slurm"]
    done = shared_cluster.run(*command, "--partition", "nowhere", check=False)
    assert done.returncode == 2, done.stderr
    assert "--partition" in done.stderr
    assert not report.exists()


@pytest.mark.slow
def test_a_job_that_somebody_cancels_is_not_waited_for(shared_cluster: Cluster, tmp_path: Path) -> None:
    report = tmp_path / "report"
    words = ["doctor", "--json", "--report", str(report), "--on", "slurm", "--mem", "100", "--sbatch", "hold"]
    command = [sys.executable, "-m", "launch.cli", *words]
    with subprocess.Popen(command, env=shared_cluster.env(), stdout=subprocess.PIPE, text=True) as waiting:
        submissions = report / "job" / "submissions.jsonl"
        shared_cluster.wait_until(lambda: submissions.exists() and submissions.read_text(), "the job is queued")
        job_id = json.loads(submissions.read_text())["job_id"]
        shared_cluster.run("scancel", job_id)
        said, _ = waiting.communicate(timeout=90)
    assert waiting.returncode == 1
    [found] = json.loads(said)["findings"]
    assert found["value"] == f"job {job_id} ended without findings: it said nothing"
