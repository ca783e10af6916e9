"""Progress for people: a bar with ETA on a terminal, plain lines elsewhere, from rank 0."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_SHOWN = {
    "train/loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "train/grad_norm": "grad norm {:.2f}",
    "frames_per_second": "{:.0f} frames/s",
    "val/loss": "dev loss {:.3f}",
    "val/wer": "dev WER {:.2f} %",
    "train/wer": "train WER {:.2f} %",
    "val/blank_rate": "blank {:.2f}",
    "val/empty_share": "empty {:.2f}",
}


class Progress:
    """Says what happens; silent on every rank but the first."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.bar: tqdm[Any] | None = None
        self.total = 0

    def start(self, *, total: int, done: int) -> None:
        """Begin the run of `total` steps, `done` of them before this attempt."""
        self.total = total
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def advance(self, loss: float) -> None:
        """Count one step."""
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Print one line of metrics."""
        parts = [form.format(metrics[name]) for name, form in _SHOWN.items() if metrics.get(name) is not None]
        self.say(f"step {metrics['step']}/{self.total} epoch {metrics['epoch']}  " + "  ".join(parts))

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()
