"""Peak memory of two ranks under each backend, measured beside what `signscale estimate` predicts.

    python benchmarks/memory.py [--backends replicated,zero1,zero2,zero3,fsdp2] [--width 2.1 --rnn_size 1088]

Real processes on this machine's CPU, over gloo, by the shipped configurations; each rank measures itself
(`memory_worker.py`). Predicted is the `sum` that the command prints for the same corpus and recipe with `--device cpu`.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(ROOT))

BACKENDS = {
    "replicated": "data parallel",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
"""What the trainer calls them, and what `signscale estimate` does."""
_BAR = 0.15
_WORKER = Path(__file__).with_name("memory_worker.py")
_DROPPED = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MALLOC_")
_RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_ARENA_MAX": "1"}
"""Has glibc give memory back as soon as it is freed, so that what is resident is what is used."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every backend in turn and print the table."""
    from trainer.data.synthetic import SyntheticSpec, write_corpus

    options = _parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        spec = SyntheticSpec(clips=options.clips, feature_dim=options.feature_dim, seed=1)
        write_corpus(spec, corpus, lambda text: None)
        flags = [
            *("--data_dir", str(corpus), "--width", str(options.width), "--rnn_size", str(options.rnn_size)),
            *("--batch_size", str(options.clips), "--max_frames_per_microbatch", str(options.budget)),
        ]
        report = _estimate(flags, options)
        predicted = {row["backend"]: row for row in report["rows"]}
        print(
            f"{report['parameters'] / 1e6:.1f} M parameters, {options.ranks} ranks; peak of the fuller one beyond "
            "what it held before there was a model, in MB"
        )
        print(f"{'backend':<15}{'measured':>10}{'predicted':>11}{'off':>8}{'of data parallel':>18}  at")
        rows: list[dict[str, Any]] = []
        for backend in options.backends.split(","):
            measured = _measure(backend, flags, options, Path(folder) / backend)
            rows.append(_row(backend, measured, predicted[BACKENDS[backend]], rows))
            _show(rows[-1])
    worst = max(abs(row["error"]) for row in rows)
    figures = {
        "benchmark": "memory",
        "parameters": report["parameters"],
        "ranks": options.ranks,
        "allocator": options.allocator,
        "bar": _BAR,
        "worst": worst,
        "met": worst <= _BAR,
        "rows": rows,
    }
    print(json.dumps(figures))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/memory.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--backends", default=",".join(BACKENDS), metavar="B,B,…", help="of %(default)s")
    add("--ranks", type=int, default=2, help="processes (default %(default)s)")
    add("--steps", type=int, default=2, help="optimizer steps of each backend (default %(default)s)")
    add("--width", type=float, default=2.1, help="of the teacher (default %(default)s)")
    add("--rnn_size", type=int, default=1088, help="of the teacher (default %(default)s)")
    add("--clips", type=int, default=16, help="clips of the corpus, all of them in every step (default %(default)s)")
    add("--feature_dim", type=int, default=6516, help="features a frame (default %(default)s)")
    add("--budget", type=int, default=200, help="frames of a pass (default %(default)s)")
    add(
        "--allocator",
        choices=("returning", "usual"),
        default="returning",
        help="whether glibc gives freed memory back at once (default), or keeps what it likes",
    )
    options = parser.parse_args(argv)
    unknown = sorted(set(options.backends.split(",")) - BACKENDS.keys())
    if unknown:
        parser.error(f"--backends: {', '.join(unknown)}; choose from {', '.join(BACKENDS)}")
    for name in ("ranks", "steps", "clips", "budget"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, found {getattr(options, name)}")
    if options.ranks < 2:
        parser.error("--ranks: on one rank there is nothing to share; expected 2 or more, found 1")
    return options


def _estimate(flags: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Ask the command itself, as a user would."""
    command = [sys.executable, "-m", "launch.cli", "estimate", *flags]
    command += ["--world_size", str(options.ranks), "--device", "cpu", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit("signscale estimate failed")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _measure(backend: str, flags: list[str], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the ranks of one backend and return what the fuller one measured."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.ranks)]
    command = [sys.executable, *launcher, str(_WORKER), *flags, "--output_dir", str(folder)]
    command += ["--max_steps", str(options.steps)]
    environment = _environment() | _variables(backend)
    if options.allocator == "returning":
        environment |= _RETURNING
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{backend} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(options.ranks)]
    found: dict[str, Any] = max(ranks, key=lambda rank: max(rank["phases"].values()))
    return found


def _environment() -> dict[str, str]:
    """Return the environment without an outer launcher's variables; one thread a rank, as launchers set it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _variables(backend: str) -> dict[str, str]:
    """Return what `accelerate launch` would tell the processes for a backend."""
    found = {"ACCELERATE_USE_CPU": "true"}
    if backend == "fsdp2":
        found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    elif backend.startswith("zero"):
        config = str(ROOT / "ds_configs" / f"{backend}.json")
        found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}
    return found


def _row(
    backend: str, measured: dict[str, Any], predicted: dict[str, Any], before: list[dict[str, Any]]
) -> dict[str, Any]:
    phases: dict[str, int] = measured["phases"]
    peak = max(phases.values())
    whole = next((row["measured"] for row in before if row["backend"] == "replicated"), None)
    if backend == "replicated":
        whole = peak
    return {
        "backend": backend,
        "measured": peak,
        "predicted": predicted["sum"],
        "error": predicted["sum"] / peak - 1.0,
        "share": None if whole is None else peak / whole,
        "at": max(phases, key=lambda name: phases[name]),
        "phases": phases,
        "before": measured["before"],
        "library_pages": measured["library_pages"],
        "estimate": predicted,
    }


def _show(row: dict[str, Any]) -> None:
    share = "-" if row["share"] is None else f"{100 * row['share']:.0f} %"
    print(
        f"{BACKENDS[row['backend']]:<15}{row['measured'] / 1e6:>10.0f}{row['predicted'] / 1e6:>11.0f}"
        f"{100 * row['error']:>+7.1f}%{share:>18}  {row['at']}",
        flush=True,
    )


if __name__ == "__main__":
    from trainer.exits import exit_on_input_error

    exit_on_input_error(main)
