"""Jobs that wait for jobs, where SLURM does not answer; tests/cluster redirects real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.pipeline.record import StageRecord
from launch.slurm.control import ask
from launch.slurm.needs import redirect_children
from trainer.job.directory import JobDirectory


def test_a_silent_controller_is_told_of_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = JobDirectory.of(tmp_path / "parent"), JobDirectory.of(tmp_path / "child")
    children = {"child": str(child.folder)}
    common = {"pipeline": "p.yaml", "command": "train", "fingerprint": "", "content": {}, "output": None}
    StageRecord(stage="parent", children=children, **common).save(parent)  # type: ignore[arg-type]
    StageRecord(stage="child", needs={"parent": str(parent.folder)}, **common).save(child)  # type: ignore[arg-type]
    for job, number in ((parent, "7"), (child, "8")):
        job.add_submission(number)
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    # A quarter of an hour otherwise.
    monkeypatch.setitem(ask.__kwdefaults__, "patience", -1.0)
    (line,) = redirect_children(parent)
    assert line.startswith("stage child (job 8) cannot be told to wait for the new job: ")
    assert "Socket timed out" in line
