"""Clips per second of the trainer, and of a plain loop over padded random batches, in each precision."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu_runs import ROOT, FailedError, Runner, Section, SkippedError
from gpu_sizes import Sizes, npz_corpus

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_BENCHMARKS = ROOT / "benchmarks"
_CLASSES = 1296

PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # Dense 10^12 operations a second from NVIDIA's data sheets: float32 without tensor cores, 16 bits with them. The
    # first name that is part of the device's counts.
    ("H100 PCIe", {"fp32": 51.0, "bf16": 756.0, "fp16": 756.0}),
    ("H100 NVL", {"fp32": 60.0, "bf16": 835.0, "fp16": 835.0}),
    ("H100", {"fp32": 67.0, "bf16": 989.0, "fp16": 989.0}),
    ("H200 NVL", {"fp32": 60.0, "bf16": 835.0, "fp16": 835.0}),
    ("H200", {"fp32": 67.0, "bf16": 989.0, "fp16": 989.0}),
    ("A100", {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0}),
    ("A10G", {}),
    ("A10", {"fp32": 31.2, "bf16": 125.0, "fp16": 125.0}),
    ("L40S", {"fp32": 91.6, "bf16": 362.0, "fp16": 362.0}),
    ("L40", {}),
    ("NVIDIA L4", {"fp32": 30.3, "bf16": 121.0, "fp16": 121.0}),
    ("V100-SXM2", {"fp32": 15.7, "fp16": 125.0}),
    ("V100-PCIE", {"fp32": 14.0, "fp16": 112.0}),
    ("Tesla T4", {"fp32": 8.1, "fp16": 65.0}),
    ("RTX 4090 Laptop", {}),
    ("RTX 4090 D", {}),
    ("RTX 4090", {"fp32": 82.6, "bf16": 165.2, "fp16": 165.2}),
    ("RTX 3090 Ti", {}),
    ("RTX 3090", {"fp32": 35.6, "bf16": 71.0, "fp16": 71.0}),
)


def measure_throughput(
    runner: Runner, section: Section, sizes: Sizes, *, machine: dict[str, Any], variants: Sequence[str]
) -> None:
    """Train and take the time, ours and the plain loop in turn."""
    counted = section.run("operations a frame", lambda: _count(runner, section, sizes))
    per_frame = counted.figures.get("flops_per_frame")
    for name in ("fp32", *(name for name in _PRECISIONS if name in variants)):
        act = _Timing(runner, section, sizes, machine, name, per_frame)
        ours = section.run(f"ours {name}", act.ours)
        theirs = section.run(f"plain loop {name}", act.plain)
        if ours.status == theirs.status == "ok":
            ratio = ours.figures["clips_per_second"] / theirs.figures["clips_per_second"]
            ours.figures["over_plain_loop"] = round(ratio, 3)


def peak_flops(name: str, precision: str) -> float | None:
    """Return a device's operations per second in a precision; None where the table does not know them."""
    for known, peaks in PEAKS:
        if known in name:
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def _count(runner: Runner, section: Section, sizes: Sizes) -> dict[str, Any]:
    model = [str(sizes.model[name]) for name in ("width", "rnn_size", "rnn_layers")]
    command = [str(_BENCHMARKS / "gpu_machine.py"), "flops", str(sizes.feature_dim), str(_CLASSES), *model]
    return runner.json_of(command, section)


class _Timing(NamedTuple):
    """One precision, timed in two ways."""

    runner: Runner
    section: Section
    sizes: Sizes
    machine: dict[str, Any]
    name: str
    per_frame: float | None

    def ours(self) -> dict[str, Any]:
        """Time the trainer, whole."""
        warmup = self.sizes.warmup
        trained = self.runner.train(f"ours_{self.name}", self._flags(), self.section)
        if len(trained.steps) <= warmup:
            raise FailedError(f"expected {warmup + self.sizes.timed_steps} steps, found {len(trained.steps)}")
        first, timed = trained.steps[warmup - 1], trained.steps[warmup:]
        seconds = timed[-1]["end"] - first["end"]
        figures = {
            "clips_per_second": sum(step["clips"] for step in timed) / seconds,
            "frames_per_second": sum(step["frames"] for step in timed) / seconds,
            "data_wait_fraction": statistics.mean(trained.waits[warmup:]),
            "peak_bytes": trained.peak(),
        }
        return figures | self._use(figures["frames_per_second"])

    def plain(self) -> dict[str, Any]:
        """Time the loop that one would write by hand."""
        workers = min(self.sizes.workers, int(self.machine["cores"]))
        own = {"npz": npz_corpus(self.runner), "warmup": self.sizes.warmup, "workers": workers}
        flags = self._flags() | {"output_dir": self.runner.folder / "unused"} | own
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        figures = self.runner.json_of([str(_BENCHMARKS / "gpu_plain.py"), *words], self.section)
        return figures | self._use(figures["frames_per_second"])

    def _flags(self) -> dict[str, Any]:
        if self.name == "bf16" and not self.machine["bf16"]:
            raise SkippedError(f"{self.machine['device']} has no bf16")
        steps = self.sizes.warmup + self.sizes.timed_steps
        return self.sizes.flags(self.runner, mixed_precision=_PRECISIONS[self.name], max_steps=steps)

    def _use(self, frames_per_second: float) -> dict[str, Any]:
        """Say what real frames make use of, and its share of the device's peak; None where either is not known."""
        used = None if self.per_frame is None else self.per_frame * frames_per_second
        peak = peak_flops(self.machine["device"], self.name)
        return {"flops": used, "mfu": None if used is None or peak is None else used / peak}
