"""A sweep of the real trainer as a job array, as it is typed on a login node; one of its runs is disturbed."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.cluster import DEADLINE, Cluster
from tests.conftest import TINY, column, train, weights
from trainer.job.directory import JobDirectory

SETTINGS = [("1e-3", "0.0"), ("1e-3", "0.3"), ("3e-3", "0.0"), ("3e-3", "0.3")]
FLAGS = [
    *["--warmup_epochs", "0", "--batch_size", "6", "--log_every", "1", "--max_steps", "300"],
    *["--evaluate_every", "100", "--save_every", "5", "--keep_checkpoints", "2"],
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_array_of_four_runs_ends_in_a_table(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep = ["--sweep", "learning_rate=1e-3,3e-3", "--sweep", "dropout=0.0,0.3", "--array", "%2"]
    size = ["--nodes", "1", "--ranks_per_node", "1", "--cpus_per_task", "1", "--mem", "3000"]
    training = ["train", "--data_dir", str(corpus), "--output_dir", str(out), *TINY, *FLAGS]
    said = cluster.run("signscale", "launch", "slurm", *size, *sweep, "--", *training).stdout
    queued = re.search(r"queued as job array (\d+)", said)
    assert queued, said
    runs = [out / f"learning_rate={rate},dropout={dropout}" for rate, dropout in SETTINGS]
    cluster.wait_until((runs[1] / "checkpoints" / "last.json").exists, "a first checkpoint", 4 * DEADLINE)
    # A job that obeys at once is on its way out when scancel looks for an answer, and scancel then tries for minutes.
    with contextlib.suppress(subprocess.TimeoutExpired):
        cluster.run("scancel", "--batch", "--signal=USR2", f"{queued[1]}_1", timeout=5, check=False)
    for task, run in enumerate(runs):
        end = cluster.wait_for_end(f"{queued[1]}_{task}", timeout=4 * DEADLINE)
        assert end.state == "COMPLETED", (run, end)
        word = JobDirectory.of(run).last_word()
        assert word is not None
        assert (word.word, word.step) == ("DONE", 300)
        assert column(run, "step")[-1] == 300
    assert [record.word for record in JobDirectory.of(runs[1]).history()] == ["RESUME", "DONE"]
    # The disturbed run is the one that would have been without the sweep and undisturbed.
    train(1, corpus, tmp_path / "alone", *FLAGS, "--learning_rate", "1e-3", "--dropout", "0.3")
    assert weights(runs[1]) == weights(tmp_path / "alone")
    table = (out / "sweep.txt").read_text()
    assert "4 of 4 runs are done; best so far: " in table
    best = min(runs, key=lambda run: min(column(run, "val/wer")))
    assert min(column(Path(table.rpartition("best so far: ")[2].strip()), "val/wer")) == min(column(best, "val/wer"))
    assert cluster.run("signscale", "sweep", str(out)).stdout.splitlines()[:5] == table.splitlines()[:5]
