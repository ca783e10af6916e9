"""Peak memory of two ranks under each backend, measured beside what `signscale estimate` predicts.

    python benchmarks/memory.py [--backends replicated,zero2,zero3,fsdp2] [--width 2.1 --rnn_size 1088]

Real processes on this machine's CPU, over gloo, each measuring itself: from before its model is made to the end of a
few steps of two passes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_FEATURE_DIM, _CLASSES = 6516, 1296
_CLIPS = (48, 32)
"""Frames of the clips of a pass."""
_BAR = 0.15
_RESULT = "RESULT "
_BACKENDS = ("replicated", "zero1", "zero2", "zero3", "fsdp2")


def zero_config(stage: int) -> dict[str, Any]:
    """Return a DeepSpeed configuration with buffers that suit models of up to a few hundred million weights."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": 10_000_000,
            "stage3_param_persistence_threshold": 0,
        },
    }


def main(argv: Sequence[str]) -> int:
    """Measure every backend in turn and print the table."""
    options = _parse(argv)
    if options.rank_of:
        return _measure(options)
    rows = [_run(backend, options) for backend in options.backends.split(",")]
    print(f"{rows[0]['parameters'] / 1e6:.1f} M parameters, {options.ranks} ranks, peak of the fuller one in MB")
    print(f"{'backend':<12}{'measured':>10}{'predicted':>11}{'off':>8}{'of data parallel':>18}")
    whole = next((row["measured"] for row in rows if row["backend"] == "replicated"), None)
    for row in rows:
        row["error"] = row["predicted"] / row["measured"] - 1.0
        row["share"] = None if whole is None else row["measured"] / whole
        share = "-" if whole is None else f"{100 * row['share']:.0f} %"
        print(
            f"{row['backend']:<12}{row['measured'] / 1e6:>10.0f}{row['predicted'] / 1e6:>11.0f}"
            f"{100 * row['error']:>+7.1f}%{share:>18}"
        )
    worst = max(abs(row["error"]) for row in rows)
    print(json.dumps({"benchmark": "memory", "bar": _BAR, "worst": worst, "met": worst <= _BAR, "rows": rows}))
    return 0 if worst <= _BAR else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__)
    parser.add_argument("--backends", default="replicated,zero2,zero3,fsdp2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--width", type=float, default=2.1)
    parser.add_argument("--rnn_size", type=int, default=1088)
    parser.add_argument("--rank_of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = set(options.backends.split(",")) - set(_BACKENDS)
    if unknown:
        parser.error(f"--backends: {', '.join(sorted(unknown))}; choose from {', '.join(_BACKENDS)}")
    return options


def _run(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of one backend and return what the fuller one measured."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        shared = {
            "WORLD_SIZE": str(options.ranks),
            "LOCAL_WORLD_SIZE": str(options.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            # Freed memory goes back to the system at once, so that what is resident is what is used.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        }
        if backend.startswith("zero"):
            config = Path(folder) / "zero.json"
            config.write_text(json.dumps(zero_config(int(backend[4]))))
            shared |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        elif backend == "fsdp2":
            shared |= {"ACCELERATE_USE_FSDP": "true"}
        command = [sys.executable, "-W", "ignore", __file__, "--rank_of", backend]
        command += ["--steps", str(options.steps), "--width", str(options.width), "--rnn_size", str(options.rnn_size)]
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(options.ranks)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("\n".join(output[-4000:] for output in outputs))
    lines = [line for output in outputs for line in output.splitlines() if line.startswith(_RESULT)]
    found: list[dict[str, Any]] = [json.loads(line.removeprefix(_RESULT)) for line in lines]
    return max(found, key=lambda row: row["measured"])


def _measure(options: argparse.Namespace) -> int:
    """Be one rank: measure a few steps, and predict them."""
    from trainer.engine import open_engine
    from trainer.memory.accounting import PeakMeter, in_use
    from trainer.memory.activations import count_activations
    from trainer.memory.cells import load_of, random_cell, run_pass
    from trainer.memory.static import Backend, static_memory, zero_backend
    from trainer.models.build import build_model
    from trainer.parsing import parse_recipe

    backend = options.rank_of
    flags = ["--width", options.width, "--rnn_size", options.rnn_size, "--data_dir", "-", "--output_dir", "-"]
    recipe = parse_recipe([str(flag) for flag in flags])
    engine = open_engine(recipe)
    if backend.startswith("zero"):
        from trainer.engine.zero import import_deepspeed

        import_deepspeed()
    # Counting also loads what a first pass loads: kernels, and the code around them.
    counted = count_activations(recipe, feature_dim=_FEATURE_DIM, num_classes=_CLASSES, checkpointing=False)
    clips = np.array(_CLIPS)
    cell = random_cell(clips, total_stride=4, feature_dim=_FEATURE_DIM, num_classes=_CLASSES, device=engine.device)
    phases = {}
    start = 0
    with PeakMeter(engine.device) as meter:
        start = meter.start
        model = build_model(recipe.model, feature_dim=_FEATURE_DIM, num_classes=_CLASSES)
        engine.prepare(model, recipe.optimization)
        engine.training(True)
    phases["prepare"] = meter.peak - start
    for step in range(options.steps):
        with PeakMeter(engine.device) as meter:
            for is_last in (False, True):
                run_pass(engine, cell, recipe.objective, is_last=is_last)
        phases[f"passes {step}"] = meter.peak - start
        with PeakMeter(engine.device) as meter:
            engine.update(1e-4, 1.0)
        phases[f"update {step}"] = meter.peak - start
        phases[f"after {step}"] = in_use(engine.device) - start
    shape = {
        "replicated": Backend(kind="replicated"),
        "fsdp2": Backend(kind="fsdp2"),
    }.get(backend) or zero_backend(zero_config(int(backend[4])))
    static = static_memory(counted.size, backend=shape, world_size=engine.world_size, optimizer="adamw", on_cuda=False)
    # The features were there before.
    activations = counted.passes.peak(load_of(clips, 4)) - cell.features.numel() * 4
    row = {
        "backend": backend,
        "rank": engine.rank,
        "parameters": counted.size.total,
        "measured": max(phases.values()),
        "predicted": static.peak(activations),
        "phases": phases,
        "static": vars(static),
        "activations": activations,
    }
    print(_RESULT + json.dumps(row), flush=True)
    engine.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
