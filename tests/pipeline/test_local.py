"""The whole pipeline here: it stops where a stage fails, and goes on there when it is typed again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.pipeline.tiny import STAGES, write_tiny
from trainer.job.directory import JobDirectory


def pipeline(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Type the command in another folder than the code's."""
    command = [sys.executable, "-m", "launch.cli", "pipeline", str(path), *words]
    return subprocess.run(
        command, cwd=path.parent, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_teacher_to_student(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The teacher is asked to stop half-way, as by Ctrl-C: what follows is not begun.
    stopped = pipeline(write_tiny(tmp_path / "p.yaml", corpus, out, teacher=", stop_after_steps: 2"))
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "stage teacher (1 of 6): stopped" in stopped.stderr
    assert "Type the same command again to go on here." in stopped.stderr
    assert not (out / "teacher-dev").exists()
    # A stage that is not as good as was asked for is not done either.
    failed = pipeline(write_tiny(tmp_path / "p.yaml", corpus, out, evaluation=", max_wer: 0"))
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "stage teacher-dev (2 of 6): is done, but not as well as was asked for: " in failed.stderr
    assert not (out / "targets").exists()
    path = write_tiny(tmp_path / "p.yaml", corpus, out)
    done = pipeline(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage teacher (1 of 6): done" in done.stdout
    assert "pipeline out: all 6 stages are done" in done.stdout
    assert "dev <= 1.1 x" in done.stdout
    assert all(JobDirectory.of(out / name).last_word().word == "DONE" for name in STAGES)
    # The teacher went on where it was, and was not trained again by the third command.
    assert len(JobDirectory.of(out / "teacher").history()) == 2
    assert "nothing to do: every stage is done" in pipeline(path).stdout
