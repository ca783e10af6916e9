"""Waiting for the job of an examination: a scheduler that is silent is not a job that is gone."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest

from launch import doctor_slurm
from trainer.job.directory import JobDirectory


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobDirectory:
    """A job that was submitted, on a machine where SLURM cannot be asked any more, and clocks that run faster."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("_POLL_SECONDS", "_ASK_SECONDS", "_AFTER_SECONDS"):
        monkeypatch.setattr(doctor_slurm, name, 0.01)
    found = JobDirectory.of(tmp_path / "run")
    found.add_submission("17", cluster=None)
    return found


def test_findings_that_come_after_a_silence_are_waited_for(
    job: JobDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str | None] = []
    findings = tmp_path / "findings"
    waiting = Thread(target=lambda: said.append(doctor_slurm._wait(job, findings)), daemon=True)
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive(), said
    findings.touch()
    waiting.join(60)
    assert said == [None]
    assert capsys.readouterr().err.count("squeue is not on the PATH") == 1


def test_a_job_that_may_still_be_queued_is_not_called_gone(
    job: JobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_slurm, "_SILENT_SECONDS", 0.1)
    why = doctor_slurm._wait(job, tmp_path / "findings")
    assert why is not None
    assert "squeue is not on the PATH" in why
    said = doctor_slurm._give_up(job, why)
    assert "it may still be queued" in said
    assert "scancel 17" in said
