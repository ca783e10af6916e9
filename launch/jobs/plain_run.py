"""The state of a run that nobody launched: a plain `signscale train`, known by its files alone."""

from __future__ import annotations

import json
import platform
import shlex
from pathlib import Path

from launch.jobs.judging import Verdict
from launch.jobs.traces import METRICS, read_saved_step
from launch.jobs.words import say_ago
from trainer.job.directory import AttemptRecord
from trainer.job.processes import is_alive

_LOCK = ".lock"
"""Names the process that works on a run; it stays behind when the process ends."""


def judge_plain(run: Path, now: float) -> Verdict:
    """Decide from the lock, the metrics and the checkpoints of a run."""
    holder = _read_holder(run)
    if holder is not None and holder.host == platform.node() and is_alive(holder):
        return Verdict(state="RUNNING", why=f"never launched; process {holder.pid} on {holder.host} works on it")
    written = [path.stat().st_mtime for path in (run / METRICS, run / "checkpoints" / "last.json") if path.exists()]
    if not written:
        return Verdict(state="NOT LAUNCHED", why="never launched; nothing trained yet")
    heard = f"last written {say_ago(max(written), now)}"
    if holder is not None and holder.host != platform.node():
        heard += f"; process {holder.pid} on {holder.host} may still work on it"
    saved = read_saved_step(run)
    if saved is None:
        return Verdict(state="NOT LAUNCHED", why=f"never launched; {heard}; no checkpoint yet")
    again = (
        f"signscale train --config {shlex.quote(str(run / 'recipe.yaml'))} --resume auto  # go on, if it is not done"
    )
    return Verdict(state="NOT LAUNCHED", why=f"never launched; {heard}", next=(again,))


def _read_holder(run: Path) -> AttemptRecord | None:
    lock = run / _LOCK
    try:
        held = json.loads(lock.read_text(encoding="utf-8"))
        return AttemptRecord(
            attempt="", began=lock.stat().st_mtime, host=str(held["host"]), pid=int(held["pid"]), job_id=None
        )
    except (OSError, ValueError, KeyError, TypeError):
        # No lock, or one that its holder is just writing.
        return None
