"""A launcher that is killed takes its ranks along."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, command, environment

_WORKER = """
import os, time
from pathlib import Path
from trainer.exits import exit_on_input_error

def main():
    note = Path({folder!r}) / f".{{os.environ['RANK']}}"
    note.write_text(str(os.getpid()))
    note.replace(note.with_name(f"rank-{{os.environ['RANK']}}"))
    time.sleep(600)

exit_on_input_error(main)
"""


def test_ranks_die_with_their_launcher(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER.format(folder=str(tmp_path)))
    launcher = subprocess.Popen(
        command(2, str(script), []), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ranks: list[int] = []
    try:
        files = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
        _wait(lambda: all(file.exists() for file in files))
        ranks = [int(file.read_text()) for file in files]
        launcher.kill()
        launcher.wait()
        _wait(lambda: not any(map(_lives, ranks)))
    finally:
        launcher.kill()
        for rank in filter(_lives, ranks):
            os.kill(rank, signal.SIGKILL)


def _wait(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        # A zombie that nobody reaps is dead.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
