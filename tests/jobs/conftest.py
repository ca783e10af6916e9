"""Runs made by hand, as a launch and its attempts leave them; no test here sees a cluster it did not make."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.job.directory import AttemptRecord, JobDirectory


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Take SLURM's tools off the PATH: what they would say is this machine's affair."""
    empty = tmp_path_factory.mktemp("path")
    monkeypatch.setenv("PATH", str(empty))
    return empty


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., JobDirectory]:
    """Write what a launch writes: `launch("name", way="slurm", job_id="7")`."""

    def write(name: str, *, way: str = "slurm", job_id: str | None = None, **plan: Any) -> JobDirectory:
        run = tmp_path / "runs" / name
        directory = JobDirectory.of(run)
        directory.folder.mkdir(parents=True)
        content = {
            "version": 1,
            "way": way,
            "name": name,
            "run": str(run),
            "command": ["train", "--config", "/a folder/recipe.yaml"],
            "nodes": 2,
            "ranks_per_node": 2,
            "tasks": None,
        }
        directory.plan.write_text(json.dumps(content | plan))
        if job_id is not None:
            directory.add_submission(job_id, cluster=None, after=[])
        return directory

    return write


def begin(directory: JobDirectory, attempt: str, *, ago: float = 60.0, **fields: Any) -> AttemptRecord:
    """Begin an attempt some seconds ago; SLURM's by default."""
    slurm = {} if attempt.startswith("local") else {"job_id": attempt.split(".")[0], "nodes": "node[1-2]"}
    record = AttemptRecord(attempt=attempt, began=time.time() - ago, **(slurm | fields))
    directory.begin(record)
    return record


@pytest.fixture
def living() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is told to end."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def local_fields(pid: int) -> dict[str, Any]:
    """Return what a local launcher records of itself."""
    return {"host": platform.node(), "pid": pid}
