"""When an attempt's time is over, as SLURM's own commands tell it; tests/cluster asks a real one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.slurm.limit import find_end_time


def squeue(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a squeue first on PATH."""
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


@pytest.mark.parametrize(("left", "seconds"), [("1:30", 90), ("2:00:05", 7205), ("1-00:00:00", 86400)])
def test_the_time_left_counts_from_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, seconds: float
) -> None:
    squeue(tmp_path, f'[ "$3" = 7_1 ] && echo {left}', monkeypatch)
    before = time.time()
    found = find_end_time("7_1")
    assert found is not None
    assert before + seconds <= found <= time.time() + seconds


@pytest.mark.parametrize(
    ("script", "said"), [("echo UNLIMITED", ""), ("echo soon", "'soon'"), ("echo no such job >&2; exit 1", "no such")]
)
def test_no_limit_and_none_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, said: str
) -> None:
    squeue(tmp_path, script, monkeypatch)
    assert find_end_time("7") is None
    out = capsys.readouterr().out
    assert said in out
    assert bool(said) == bool(out)


def test_newer_releases_tell_it_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue(tmp_path, "exit 1", monkeypatch)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert find_end_time("7") == 1700000000.0
