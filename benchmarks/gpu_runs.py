"""Runs of the GPU benchmark: each in processes of its own, under a time limit, so that none takes others with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
WORKER = str(Path(__file__).with_name("gpu_worker.py"))
REPORT, LIMIT, LIMIT_FROM = "GPU_BENCHMARK_REPORT", "GPU_BENCHMARK_LIMIT", "GPU_BENCHMARK_LIMIT_FROM"
"""Environment variables of `gpu_worker.py`."""

_DROPPED = ("ACCELERATE_", "SIGNSCALE_", "GPU_BENCHMARK_", "FSDP_", "WANDB_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
_LAST_LINES = 12
_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}

Status = Literal["ok", "skipped", "failed"]


class SkippedError(Exception):
    """Says why a part cannot run here."""


class FailedError(Exception):
    """Says what went wrong in a part."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that a section found out, or why it did not."""

    name: str
    status: Status
    why: str = ""
    """Reason of `skipped` and `failed`."""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Section:
    """A group of parts that share a time limit."""

    name: str
    seconds: float
    """Time that all parts together may take."""
    parts: list[Part] = field(default_factory=list)
    took: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.monotonic()

    def left(self) -> float:
        """Return the seconds that are left. Raises `FailedError` if there are none."""
        left = self.seconds - (time.monotonic() - self._started)
        if left <= 1:
            # A check that was not made is not one that passed.
            raise FailedError(f"not begun: the {self.seconds:.0f} s of this section were used up")
        return left

    def run(self, name: str, act: Callable[[], dict[str, Any]]) -> Part:
        """Run one part; whatever it raises is its result."""
        try:
            part = Part(name=name, status="ok", figures=act())
        except SkippedError as error:
            part = Part(name=name, status="skipped", why=str(error))
        except FailedError as error:
            part = Part(name=name, status="failed", why=str(error))
        except Exception:
            part = Part(name=name, status="failed", why=_last_lines(traceback.format_exc()))
        self.parts.append(part)
        self.took = time.monotonic() - self._started
        note = f" ({part.why.splitlines()[-1]})" if part.why else ""
        print(f"{self.took:6.1f} s  {self.name}: {name}: {part.status}{note}", file=sys.stderr, flush=True)
        return part

    @property
    def status(self) -> Status:
        """Return `failed` if a part failed, `skipped` if none ran."""
        found = {part.status for part in self.parts}
        return "failed" if "failed" in found else "ok" if "ok" in found else "skipped"

    def to_json(self) -> dict[str, Any]:
        """Return everything for the JSON report."""
        parts = {part.name: {"status": part.status, "why": part.why, "figures": part.figures} for part in self.parts}
        return {
            "status": self.status,
            "limit_seconds": self.seconds,
            "seconds": round(self.took, 1),
            "parts": parts,
        }


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run of the trainer left."""

    losses: list[float | None]
    """Training loss of each step; None where it was skipped."""
    waits: list[float]
    """Share of each step spent waiting for clips."""
    steps: list[dict[str, Any]]
    """What `gpu_worker.py` measured in each attempt at a step: see there."""
    events: list[dict[str, Any]]
    """What `relief.json` says."""
    output: str

    def peak(self, key: str = "peak") -> int:
        """Return the most bytes in use in any step after the first, which makes the optimizer's states."""
        return max(int(step[key]) for step in self.steps[1:] or self.steps)


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Starts processes on one GPU, or on the CPU, and keeps what they write in one folder."""

    folder: Path
    on_gpu: bool

    def python(self, command: Sequence[str], section: Section, extra: Mapping[str, str] | None = None) -> str:
        """Run Python to its end and return its output. Raises `FailedError` if it fails or takes too long."""
        seconds = section.left()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *command],
                env=self._environment() | dict(extra or {}),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group of its own: a process that hangs is ended with all that it started.
                start_new_session=True,
            )
            try:
                process.wait(timeout=seconds)
                ended = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"still running when the {section.seconds:.0f} s of this section were used up"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            said = output.read()
        if process.returncode:
            raise FailedError(f"{ended}; last lines:\n{_last_lines(said)}")
        return said

    def json_of(self, command: Sequence[str], section: Section) -> dict[str, Any]:
        """Run Python to its end and return the JSON of its last line."""
        found: dict[str, Any] = json.loads(self.python(command, section).strip().splitlines()[-1])
        return found

    def train(
        self,
        name: str,
        flags: Mapping[str, Any],
        section: Section,
        *,
        backend: str = "replicated",
        limit: int = 0,
        limit_from: int = 0,
    ) -> Trained:
        """Train under a backend, on one rank; `limit`: bytes that it may use from step `limit_from` on (0: all)."""
        folder = self.folder / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        report, run = folder / "report.json", folder / "run"
        extra = self._rank() | launcher_variables(backend, folder) | {REPORT: str(report)}
        if limit:
            extra |= {LIMIT: str(limit), LIMIT_FROM: str(limit_from)}
            # glibc: what is freed is unmapped, so that what is mapped when the limit comes is what is used.
            extra |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_ARENA_MAX": "1"}
        # Each flag a word of its own: a run that starts itself again adds more of them.
        words = [word for key, value in {**flags, "output_dir": run}.items() for word in (f"--{key}", str(value))]
        output = self.python([WORKER, *words], section, extra)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        events = run / "relief.json"
        return Trained(
            losses=[line["train/loss"] for line in lines if "train/loss" in line],
            waits=[line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line],
            steps=json.loads(report.read_text(encoding="utf-8")),
            events=json.loads(events.read_text(encoding="utf-8")) if events.exists() else [],
            output=output,
        )

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED)}
        kept |= {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if self.on_gpu:
            # One GPU, the first of those that are visible.
            return kept | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        return kept | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def _rank(self) -> dict[str, str]:
        """Say what a launcher says to the one rank of a run; no launcher in between, which would outlive its time."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return {
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }


def launcher_variables(backend: str, folder: Path) -> dict[str, str]:
    """Say what `accelerate launch` says about a backend, or about a DeepSpeed configuration named by its path.

    Configurations that this benchmark makes itself go into `folder`.
    """
    if backend.endswith(".json"):
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": backend}
    if backend == "fsdp2":
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if not backend.startswith("zero"):
        return {}
    stage = int(backend[4])
    settings: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 10_000_000}
    if stage == 3:
        # Even a small model's weights are to be parted.
        settings["stage3_param_persistence_threshold"] = 0
    if backend.endswith("_offload"):
        settings |= _OFFLOAD
    path = folder / f"{backend}.json"
    content = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": settings,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def _last_lines(text: str) -> str:
    return "\n".join(line[:300] for line in text.strip().splitlines()[-_LAST_LINES:])
