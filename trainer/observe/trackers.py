"""Trackers: metrics.jsonl always, TensorBoard and wandb as the recipe says; rank 0 alone holds any."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.files import FencedFolder

METRICS = "metrics.jsonl"
_WANDB_ID = "wandb_id"


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Take one line of metrics; `step` and `epoch` are among them."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """`metrics.jsonl`: one object a line, handed to the system before `log` returns."""

    def __init__(self, folder: FencedFolder, *, after_step: int) -> None:
        """Go on after `after_step`; once another attempt owns the run, the folder's fence raises before any line."""
        self._fence, path = folder.fence, folder.path / METRICS
        if path.exists():
            # An attempt that died may have logged steps that its successor does again.
            lines = path.read_text(encoding="utf-8").splitlines()
            folder.write_text(METRICS, "".join(f"{line}\n" for line in lines if _step_of(line) <= after_step))
        self.file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line; what is not finite becomes null, which JSON can hold."""
        self._fence()
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=after_step + 1)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write every number."""
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class Wandb:
    """Weights & Biases; offline unless a key is configured, and never a prompt."""

    def __init__(self, folder: FencedFolder, project: str, recipe: Mapping[str, Any]) -> None:
        import wandb

        name = folder.path / _WANDB_ID
        if not name.exists():
            # Kept with the run, so that a resumed run continues the same record.
            folder.write_text(_WANDB_ID, uuid.uuid4().hex[:8])
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        self.run = wandb.init(
            project=project,
            id=name.read_text(),
            resume="allow",
            dir=str(folder.path),
            config=dict(recipe),
            mode=mode,
            settings=wandb.Settings(silent=True),
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send one line."""
        self.run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        """Finish the record."""
        self.run.finish()


def open_trackers(
    folder: FencedFolder,
    names: Sequence[str],
    *,
    after_step: int,
    project: str,
    recipe: Mapping[str, Any],
) -> list[Tracker]:
    """Open the trackers of a run that goes on after `after_step`; the first asks the fence for all."""
    trackers: list[Tracker] = [JsonLines(folder, after_step=after_step)]
    if "tensorboard" in names:
        trackers.append(TensorBoard(folder.path / "tensorboard", after_step=after_step))
    if "wandb" in names:
        trackers.append(Wandb(folder, project, recipe))
    return trackers


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # The last line of an attempt that was killed may be cut short.
        return math.inf
