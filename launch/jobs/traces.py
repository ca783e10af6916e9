"""What a run's own files tell of its progress; read while others write them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.job.directory import AttemptRecord

METRICS = "metrics.jsonl"
_TAIL_BYTES = 256 * 1024
_STEP_OF_TOTAL = re.compile(r"\bstep (\d+)/(\d+) epoch\b")
_CHECKPOINT = re.compile(r"step-(\d{9})")
_SHOWN = {
    "train/loss": "loss {:.4g}",
    "val/wer": "dev WER {:.2f} %",
    "train/wer": "train WER {:.2f} %",
    "lr": "lr {:.2e}",
    "frames_per_second": "{:.0f} frames/s",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int | None = None
    """Newest optimizer step that a file tells of."""
    total: int | None = None
    """Steps in all; None where no file tells."""
    epoch: int | None = None
    saved: int | None = None
    """Step of the newest checkpoint."""
    steps_per_second: float | None = None
    """In the attempt that works now, validations and saves included."""
    metrics: dict[str, float]
    """The newest value of each."""
    heard: float | None = None
    """Unix seconds of the last line of metrics or checkpoint."""

    def say_metrics(self) -> str:
        """Return the newest metrics as one line."""
        return ", ".join(form.format(self.metrics[name]) for name, form in _SHOWN.items() if name in self.metrics)


def read_progress(run: Path, attempt: AttemptRecord | None, log: Path | None, *, first_step: int = 0) -> Progress:
    """Read metrics, checkpoints and the log of the newest attempt; whatever is not there is left open.

    `first_step`: what was saved when the attempt began.

    Raises `InputError` naming a file that cannot be read.
    """
    rows = _read_rows(run / METRICS)
    steps = [int(row["step"]) for row in rows if isinstance(row.get("step"), int | float)]
    metrics = {
        name: float(value)
        for row in rows
        for name, value in row.items()
        if name not in ("step", "epoch") and isinstance(value, int | float)
    }
    saved = read_saved_step(run)
    marks = _checkpoint_times(run)
    written = _modified(run / METRICS)
    if steps and written is not None:
        marks.append((written, steps[-1]))
    step, total = _find_total(log)
    said = _modified(log) if log is not None and step is not None else None
    if step is not None and said is not None:
        marks.append((said, step))
    known = [number for number in (steps[-1] if steps else None, saved, step) if number is not None]
    return Progress(
        step=max(known, default=None),
        total=total,
        epoch=next((int(row["epoch"]) for row in reversed(rows) if isinstance(row.get("epoch"), int | float)), None),
        saved=saved,
        steps_per_second=_rate(marks, attempt, first_step),
        metrics=metrics,
        heard=max((moment for moment, _ in marks), default=None),
    )


def read_saved_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint. Raises `InputError` where the pointer to it is damaged."""
    pointer = run / "checkpoints" / "last.json"
    try:
        name = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
        return int(_CHECKPOINT.fullmatch(name)[1])  # type: ignore[index]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{pointer}: names no checkpoint ({error}); go on with --resume auto, which mends it"
        ) from error


def tail(path: Path, *, num_bytes: int = _TAIL_BYTES) -> str:
    """Read the end of a text file, from the first whole line on; a file that is not there is empty."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return text if size <= num_bytes else text.partition("\n")[2]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in tail(path).splitlines():
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            # The last line may be half-written, and that of an attempt that was killed stays so.
            continue
    return rows


def _checkpoint_times(run: Path) -> list[tuple[float, int]]:
    """List (Unix seconds, step) of the checkpoints that are there, oldest first."""
    found = []
    try:
        with os.scandir(run / "checkpoints") as entries:
            for entry in entries:
                match = _CHECKPOINT.fullmatch(entry.name)
                moment = _modified(Path(entry.path)) if match else None
                if match and moment is not None:
                    found.append((moment, int(match[1])))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{run / 'checkpoints'}: cannot be read ({error.strerror})") from error
    return sorted(found)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        # Pruned, or replaced, while it was looked at.
        return None


def _find_total(log: Path | None) -> tuple[int | None, int | None]:
    """Find the last `step 12/340 epoch 1` that rank 0 printed."""
    found = _STEP_OF_TOTAL.findall(tail(log)) if log else []
    return (int(found[-1][0]), int(found[-1][1])) if found else (None, None)


def _rate(marks: list[tuple[float, int]], attempt: AttemptRecord | None, first_step: int) -> float | None:
    """Return steps per second between the first and the last mark of an attempt; None where there are not two."""
    since = attempt.began if attempt else 0.0
    inside = sorted(mark for mark in marks if mark[0] >= since)
    if attempt and len({step for _, step in inside}) == 1:
        # The start-up counts in, until there is a second mark.
        inside.insert(0, (attempt.began, first_step))
    if not inside or inside[-1][0] <= inside[0][0] or inside[-1][1] <= inside[0][1]:
        return None
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
