"""Ranks that no launcher of torch starts: their ends are all seen, whoever sees them first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from trainer.job.directory import ATTEMPT, JOB, AttemptRecord, JobDirectory

RANKS = 6

# Ends at the same time as all others, so that some are found ended by whoever wants to end them.
WORKER = f"""
import os, sys, time
from pathlib import Path
Path(f"ready-{{os.environ['RANK']}}").touch()
while len(list(Path().glob("ready-*"))) < {RANKS}:
    time.sleep(0.001)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("code", "expected", "word"), [(0, 0, "DONE"), (3, 1, None), (2, 2, "FAILED")])
def test_ranks_that_end_together(tmp_path: Path, code: int, expected: int, word: str | None) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    job = JobDirectory(tmp_path / "job")
    job.begin(AttemptRecord(attempt="1.0", began=1.0))
    environ = environment() | {JOB: str(job.folder), ATTEMPT: "1.0", "WORLD_SIZE": str(RANKS)}
    environ["PYTHONPATH"] += os.pathsep + str(tmp_path)
    arguments = ["plain", str(RANKS), str(tmp_path / "logs"), "worker", str(code)]
    done = subprocess.run(
        [sys.executable, "-m", "launch.jobs.ranks", *arguments],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expected, done.stderr
    assert done.stderr == ""
    last = job.last_word()
    assert (last.word if last else None) == word
