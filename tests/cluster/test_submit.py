"""From `signscale launch slurm` to ranks on real nodes: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.jobs.plan import Plan
from launch.slurm.environment import ports
from tests.cluster.cluster import Cluster
from tests.launch.test_job_script import HOSTILE, VARIANTS
from trainer.job.directory import JobDirectory

# pyxis adds options to sbatch; its plugin is not to be had as a package.
NOT_HERE = {"pyxis"}
# Nodes that are switched on when they are needed: sbatch --test-only counts on them, and no daemon has to run.
LARGE = """
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=3600
NodeName=node[3-9] CPUs=64 RealMemory=500000 Gres=gpu:a100:4 Feature=a100,nvlink State=CLOUD
NodeName=node10 CPUs=64 RealMemory=500000 Feature=h100 State=CLOUD
PartitionName=a Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=b Nodes=ALL MaxTime=INFINITE State=UP
"""


def launch(
    cluster: Cluster, run: Path, *options: str, command: tuple[str, ...] = (), check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Launch a command whose ranks write down what they see."""
    plain = ["--launcher", "plain", "--mem", "100", "--cpus_per_task", "1", "--run", str(run)]
    words = ["launch", "slurm", *plain, *options, "--", "-m", "tests.cluster.show", str(run), *command]
    home = str(run.parent / "home")
    return cluster.run(sys.executable, "-m", "launch.cli", *words, check=check, XDG_CONFIG_HOME=home, **env)


def job_of(said: subprocess.CompletedProcess[str]) -> str:
    return said.stdout.split("queued as job ")[1].split(";")[0]


def output_of(run: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted((run / "job" / "logs").glob("*.*")))


def ranks_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("rank-*.json"))]


def finish(cluster: Cluster, run: Path, job_id: str, state: str) -> None:
    end = cluster.wait_for_end(job_id)
    assert end.state == state, output_of(run)


def test_ranks_start_with_what_was_typed_and_nothing_typed_is_executed(shared_cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / HOSTILE.replace("\\", "_")
    outer = {"A_KEY": "s3cr3t", "SLURM_NNODES": "7", "SLURM_JOB_ID": "1", "MASTER_PORT": "1"}
    size = ["--nodes", "2", "--ranks_per_node", "2"]
    said = launch(shared_cluster, run, *size, "--name", HOSTILE, "--comment", HOSTILE, command=(HOSTILE,), **outer)
    assert "queued as job" in said.stdout
    assert "#!/bin/bash" not in said.stdout
    for command in ("status", "logs -f", "cancel"):
        assert f"signscale {command} " in said.stdout
    finish(shared_cluster, run, job_of(said), "COMPLETED")
    ranks = ranks_of(run)
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"4"}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1
    plan = Plan.load(run / "job" / "plan.json")
    for rank in ranks:
        assert rank["arguments"] == [HOSTILE]
        assert rank["folder"] == rank["PYTHONPATH"] == str(plan.snapshot)
        assert rank["GLOO_SOCKET_IFNAME"] == "eth0"
        assert (rank["A_KEY"], rank["SLURM_NNODES"]) == ("s3cr3t", "2")
    assert "s3cr3t" not in plan.job.script.read_text() + plan.job.plan.read_text()
    assert not [path for path in tmp_path.rglob("CANARY") if path.is_file()]
    record = JobDirectory.of(run).history()[0]
    assert (record.word, record.attempt) == ("DONE", f"{job_of(said)}.0")


def test_one_rank_on_one_node_and_an_environment_that_stays_at_home(shared_cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = launch(shared_cluster, run, "--export", "NONE", A_KEY="s3cr3t")
    finish(shared_cluster, run, job_of(said), "COMPLETED")
    [rank] = ranks_of(run)
    assert (rank["RANK"], rank["WORLD_SIZE"], rank["A_KEY"]) == ("0", "1", None)


@pytest.mark.parametrize("cluster", [{"nodes": 1, "conf": LARGE}], indirect=True)
def test_sbatch_accepts_what_is_rendered(cluster: Cluster, tmp_path: Path) -> None:
    refused = {}
    for name, options in VARIANTS.items():
        if name in NOT_HERE:
            continue
        run = tmp_path / name / "a b"
        run.parent.mkdir()
        plain = ["--launcher", "plain", "--dry-run", "--name", HOSTILE, "--run", str(run), *options]
        words = ["launch", "slurm", *plain, "--", "-m", "tests.cluster.show"]
        home = str(tmp_path / "home")
        shown = cluster.run(sys.executable, "-m", "launch.cli", *words, XDG_CONFIG_HOME=home).stdout
        script = tmp_path / name / "job.sh"
        script.write_text("#!/bin/bash\n" + shown.split("#!/bin/bash\n", 1)[1])
        said = cluster.run("sbatch", "--test-only", script, check=False).stderr
        if "to start at" not in said:
            refused[name] = said
        assert not run.exists()
    assert not refused


@pytest.mark.parametrize(
    ("options", "blamed"),
    [
        (["--partition", "nowhere"], "look at --partition"),
        (["--gpus_per_node", "a100:4"], "--gpus_per_node"),
        pytest.param(["--mem", "900G"], "--mem", marks=pytest.mark.slow),
        (["--constraint", "nvlink"], "look at --constraint"),
        pytest.param(["--nodelist", "node9"], "look at --nodelist", marks=pytest.mark.slow),
        (["--sbatch", "no-such-option=1"], "look at --sbatch"),
        pytest.param(["--reservation", "none"], "look at --reservation", marks=pytest.mark.slow),
    ],
)
def test_a_refusal_is_shown_with_the_option_to_blame(
    shared_cluster: Cluster, tmp_path: Path, options: list[str], blamed: str
) -> None:
    refused = launch(shared_cluster, tmp_path / "run", *options, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: sbatch refused the job: ")
    assert blamed in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    "options", [["--nodes", "99"], pytest.param(["--cpus_per_task", "900"], marks=pytest.mark.slow)]
)
def test_a_job_that_could_never_start_is_queued_with_a_warning(
    shared_cluster: Cluster, tmp_path: Path, options: list[str]
) -> None:
    said = launch(shared_cluster, tmp_path / "run", *options)
    assert said.stderr.startswith("warning: the job may never start: ")
    assert options[0] in said.stderr
    shared_cluster.run("scancel", job_of(said))


def test_a_run_that_waits_in_the_queue_is_not_launched_twice(shared_cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = job_of(launch(shared_cluster, run, "--sbatch", "hold"))
    again = launch(shared_cluster, run, check=False)
    assert again.returncode == 2
    assert f"job {job_id}" in again.stderr
    assert f"signscale cancel {run}" in again.stderr
    shared_cluster.run("scancel", job_id)
    shared_cluster.wait_for_state(job_id, "CANCELLED")
    assert launch(shared_cluster, run, "--dry-run").returncode == 0


def test_a_port_that_is_taken_is_left_to_whoever_has_it(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = job_of(launch(cluster, run, "--nodes", "2", "--sbatch", "hold"))
    taken, free, *_ = ports(f"{job_id}.0")
    hold = f"import socket,time; s=socket.create_server(('',{taken})); open('{tmp_path}/held','w'); time.sleep(600)"
    cluster.exec_on("node1", "sh", "-c", f'{sys.executable} -c "{hold}" >/dev/null 2>&1 </dev/null &')
    cluster.wait_until((tmp_path / "held").exists, "the port is taken")
    cluster.run("scontrol", "release", job_id)
    finish(cluster, run, job_id, "COMPLETED")
    assert {rank["MASTER_PORT"] for rank in ranks_of(run)} == {str(free)}


def failure(cluster: Cluster, run: Path, job_id: str) -> str:
    """Wait for a job's failure; return the reason in its last word."""
    finish(cluster, run, job_id, "FAILED")
    word = JobDirectory.of(run).last_word()
    assert word is not None, output_of(run)
    assert word.word == "FAILED"
    return word.reason


def test_nodes_that_cannot_take_part_are_named(cluster: Cluster, tmp_path: Path) -> None:
    """Other versions on one node, an interpreter that it lacks, and a run directory that it does not see."""
    both = ["--nodes", "2", "--max_attempts_without_progress", "1"]
    # As long as busy nodes may take to come; only for the one that never does it is waited to the end.
    patient, hasty = ["--meeting_seconds", "60"], ["--meeting_seconds", "10"]
    run = tmp_path / "versions"
    job_id = job_of(launch(cluster, run, *both, *patient, "--sbatch", "hold"))
    # Found before the installed one: as if another environment were active on node2.
    here, there = run / "job" / "snapshot" / "accelerate-1.dist-info", tmp_path / "there"
    for folder, version in ((here, "1.0"), (there, "2.0")):
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: accelerate\nVersion: {version}\n")
    cluster.exec_on("node2", "mount", "--bind", there, here)
    cluster.run("scontrol", "release", job_id)
    assert "node2 has accelerate 2.0, node1 has 1.0; give all nodes the same" in failure(cluster, run, job_id)
    assert not ranks_of(run)

    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    cluster.exec_on("node2", "mount", "-t", "tmpfs", "tmpfs", tools)
    run = tmp_path / "interpreter"
    # A link to a virtual environment's Python does not know its packages.
    path = ["--setup", f"export PYTHONHOME={sys.base_prefix}"]
    job_id = job_of(launch(cluster, run, *both, *patient, *path, "--interpreter", str(tools / "python")))
    assert f"node2 has no {tools}/python; check --interpreter" in failure(cluster, run, job_id)

    run = tmp_path / "unseen" / "run"
    run.parent.mkdir()
    cluster.exec_on("node2", "mount", "-t", "tmpfs", "tmpfs", run.parent)
    job_id = job_of(launch(cluster, run, *both, *hasty))
    assert "node2 did not come in time" in failure(cluster, run, job_id)
    assert f"node2 does not see {run}" in output_of(run)
