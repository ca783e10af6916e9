"""Train as `trainer.train` does, measuring every step, with memory limited for real where the environment says.

GPU_BENCHMARK_REPORT: where to write a JSON list with an entry for each attempt at a step: `end` (clock, in seconds),
`backend` (as the ladder names it), `clips`, `frames`, `start` (bytes in use before it), `passes` (most bytes in use
until the optimizer's turn), `peak` and `reserved` (most bytes in use, and held by the allocator).

GPU_BENCHMARK_LIMIT: bytes that may be used from step GPU_BENCHMARK_LIMIT_FROM on. On a CUDA device in all, of what the
allocator may take from the device; on a CPU in each step beyond what is mapped when it begins, since address space runs
out for threads too, and between steps some start.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_runs import LIMIT, LIMIT_FROM, REPORT

import trainer.loop
import trainer.train
from trainer.engine import Engine
from trainer.exits import exit_on_input_error
from trainer.loop import TrainingRun
from trainer.memory.exhaustion import memory_figures


def main() -> int:
    """Patch the loop to be watched, then train."""
    watch = Watch(Path(os.environ[REPORT]), int(os.environ.get(LIMIT, "0")), int(os.environ.get(LIMIT_FROM, "0")))
    step, start = trainer.loop.train_step, TrainingRun._train

    def watched_step(engine: Engine, share: Any, cells: Any, **options: Any) -> Any:
        watch.begin(engine)
        outcome = step(engine, share, cells, **options)
        watch.end(engine, clips=len(share.batch.clips), frames=int(share.frames))
        return outcome

    def watched_run(self: Any) -> str:
        reason = start(self)
        watch.write()
        return reason

    trainer.loop.train_step = watched_step
    TrainingRun._train = watched_run  # type: ignore[method-assign]
    return trainer.train.main()


class Watch:
    """Notes what each step took, and sets the limit when its time has come."""

    def __init__(self, report: Path, limit: int, limit_from: int) -> None:
        self._report, self._limit, self._limit_from = report, limit, limit_from
        self._steps: list[dict[str, Any]] = []
        self._start = self._passes = 0
        self._engine: Engine | None = None

    def begin(self, engine: Engine) -> None:
        """Note what is in use before a step."""
        if self._engine is None:
            self._engine = engine
            self._watch_update(engine)
        if self._limit and len(self._steps) >= self._limit_from:
            set_limit(engine.device, self._limit)
        self._start, _, _ = in_use(engine.device)
        self._passes = 0
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)

    def end(self, engine: Engine, *, clips: int, frames: int) -> None:
        """Note what a step took."""
        if engine.device.type == "cpu":
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        _, peak, reserved = in_use(engine.device)
        figures = {"start": self._start, "passes": self._passes or peak, "peak": peak, "reserved": reserved}
        counts = {"backend": engine.rung, "clips": clips, "frames": frames}
        self._steps.append({"end": time.perf_counter(), **counts, **figures})

    def write(self) -> None:
        """Write the report; of a run that started itself again, the last attempt is left."""
        self._report.write_text(json.dumps(self._steps), encoding="utf-8")

    def _watch_update(self, engine: Engine) -> None:
        update = engine.update

        def watched(learning_rate: float, max_norm: float) -> Any:
            _, self._passes, _ = in_use(engine.device)
            return update(learning_rate, max_norm)

        engine.update = watched  # type: ignore[method-assign]


def in_use(device: torch.device) -> tuple[int, int, int]:
    """Return the bytes in use now, the most of them, and the most that the allocator held."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return *allocated, torch.cuda.max_memory_reserved(device)
    figures = memory_figures(device)
    peak = int(figures["memory/peak_mb"] * 1e6)
    return int(figures["memory/resident_mb"] * 1e6), peak, peak


def set_limit(device: torch.device, limit: int) -> None:
    """Limit what this process may use from now on."""
    if device.type == "cuda":
        # What is cached stays usable whatever the limit.
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), torch.cuda.current_device())
        return
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    exit_on_input_error(main)
