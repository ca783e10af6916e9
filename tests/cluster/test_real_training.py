"""The trainer itself on two nodes: the curve of one process, and the weights of a run that nothing disturbed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.cluster import DEADLINE, Cluster
from tests.conftest import TINY, column, launch, train, weights
from trainer.job.directory import JobDirectory

RECIPE = ["--warmup_epochs", "0", "--learning_rate", "1e-3", "--batch_size", "6", "--log_every", "1"]
SHORT = [*RECIPE, "--max_steps", "8", "--evaluate_every", "8"]
LONG = [*RECIPE, "--max_steps", "80", "--evaluate_every", "40", "--save_every", "5", "--keep_checkpoints", "2"]
SECONDS = 3 * DEADLINE
"""Six processes import torch here, on cores that others use too."""


def test_two_nodes_of_two_ranks_follow_the_curve_of_one_process(
    shared_cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    train(1, corpus, tmp_path / "single", *SHORT)
    job_id = launch_training(shared_cluster, corpus, tmp_path / "two nodes", *SHORT)
    assert shared_cluster.wait_for_end(job_id, timeout=SECONDS).state == "COMPLETED", said(tmp_path / "two nodes")
    expected, found = (column(tmp_path / run, "train/loss") for run in ("single", "two nodes"))
    assert len(expected) == 8
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    word = JobDirectory.of(tmp_path / "two nodes").last_word()
    assert word is not None
    assert (word.word, word.step) == ("DONE", 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["warned", "power cut", "network cut"])
@pytest.mark.parametrize("cluster", [{"nodes": 3}], indirect=True)
def test_a_disturbed_training_ends_in_the_same_bits(cluster: Cluster, corpus: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    job_id = launch_training(cluster, corpus, run, *LONG)
    cluster.wait_until((run / "checkpoints" / "last.json").exists, "a first checkpoint", SECONDS)
    state = cluster.job(job_id)
    nodes = cluster.run("scontrol", "show", "hostnames", state.nodes).stdout.split()
    other = next(node for node in nodes if node != state.batch_host)
    if what == "warned":
        cluster.run("scancel", "--batch", "--signal=USR2", job_id)
    elif what == "power cut":
        cluster.kill_node(other)
    else:
        cluster.cut_node(other)
    assert cluster.wait_for_end(job_id, timeout=2 * SECONDS).state == "COMPLETED", said(run)
    words = [record.word for record in JobDirectory.of(run).history()]
    assert words == ["RESUME" if what == "warned" else None, "DONE"], said(run)
    flags = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "undisturbed"), *TINY, *LONG]
    launch(4, "trainer.train", flags, timeout=2 * SECONDS)
    assert column(run, "step") == column(tmp_path / "undisturbed", "step")
    assert weights(run) == weights(tmp_path / "undisturbed")


def launch_training(cluster: Cluster, corpus: Path, run: Path, *flags: str) -> str:
    """Launch the tiny teacher on two nodes of two ranks by the command that users type; return the job's id."""
    size = ["--nodes", "2", "--ranks_per_node", "2", "--cpus_per_task", "1", "--mem", "4000"]
    training = ["train", "--data_dir", str(corpus), "--output_dir", str(run), *TINY, *flags]
    said = cluster.run("python", "-m", "launch.cli", "launch", "slurm", *size, "--", *training).stdout
    queued = re.search(r"queued as job (\d+)", said)
    assert queued, said
    return queued[1]


def said(run: Path) -> str:
    """Return the end of all that the job said."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(JobDirectory.of(run).logs.glob("*.out")))
