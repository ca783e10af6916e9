"""One message for a group of ranks, whichever of them is the first to leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, environment

# Rank 0 comes late, as where it alone writes or loads something first.
LATE_RANK_0 = """
import os, time
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
def main():
    if os.environ["RANK"] == "0":
        time.sleep(4)
    raise InputError("batch_size: expected at least 1, found 0")
exit_on_input_error(main)
"""

# Rank 1 alone knows of an error, while rank 0 waits for it in a collective.
ONE_RANK_LEAVES = """
import os, time
import torch.distributed as dist
import torch
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
def main():
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        time.sleep(1)
        error = InputError("clip_17.npz: truncated")
        error.local = True
        raise error
    dist.all_reduce(torch.zeros(1))
exit_on_input_error(main)
"""


def _launch(text: str, script: Path) -> subprocess.CompletedProcess[str]:
    script.write_text(text)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*launcher, script], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_ranks_leave_after_rank_0_has_spoken(tmp_path: Path) -> None:
    done = _launch(LATE_RANK_0, tmp_path / "script.py")
    assert done.stderr.count("error: batch_size: expected at least 1, found 0") == 1
    assert "trainer.errors.InputError" not in done.stderr


def test_a_rank_that_waits_in_vain_says_so_in_a_line(tmp_path: Path) -> None:
    """Straight processes, without a launcher that ends the others at once."""
    (tmp_path / "script.py").write_text(ONE_RANK_LEAVES)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_000 + os.getpid() % 10_000), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, tmp_path / "script.py"],
            env=environment() | address | {"RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    (_, waiting), (_, leaving) = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 2]
    assert leaving.strip().endswith("error: clip_17.npz: truncated")
    assert "rank 0: another rank has left" in waiting
    assert "Traceback" not in waiting


def test_an_error_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from trainer.exits import exit_on_input_error\nexit_on_input_error(lambda: int('x'))\n")
    done = subprocess.run([sys.executable, script], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_early_is_no_failure_of_ours() -> None:
    command = [sys.executable, "-m", "launch.cli", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
