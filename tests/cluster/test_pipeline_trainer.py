"""The whole pipeline with the real trainer, as it is typed on a login node."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.pipeline.tiny import STAGES, write_tiny
from trainer.job.directory import JobDirectory, read_lines


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_teacher_to_student(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_tiny(tmp_path / "p.yaml", corpus, out)
    command = ["signscale", "pipeline", path, "--on", "slurm", "--cpus_per_task", "1", "--mem", "2000"]
    said = cluster.run(*command, cwd=tmp_path, timeout=900).stdout
    numbers = {name: str(read_lines(out / name / "job" / "submissions.jsonl")[-1]["job_id"]) for name in STAGES}
    assert f"signscale status {out}/teacher" in said
    # Typed again while it is under way, it changes nothing.
    again = cluster.run(*command, cwd=tmp_path, timeout=900).stdout
    assert f"is queued or at work as job {numbers['compare']}" in again
    for name in STAGES:
        cluster.wait_for_end(numbers[name], timeout=900)
        word = JobDirectory.of(out / name).last_word()
        logs = "".join(log.read_text() for log in (out / name / "job" / "logs").glob("*.log"))
        assert word is not None, logs
        assert word.word == "DONE", logs
    compared = "".join(log.read_text() for log in (out / "compare" / "job" / "logs").glob("*.log"))
    assert str(out / "student") in compared
    assert "dev <= 1.1 x" in compared
    assert "nothing to do: every stage is done" in cluster.run(*command, cwd=tmp_path, timeout=900).stdout
