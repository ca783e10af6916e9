"""Planning: what a rank among thousands pays, in time and memory, to know who computes what.

Every rank derives the plan and the allotment of every step for itself. Here one process does so for a whole epoch of 10
million clips (generated lengths) on 4,096 ranks, by `trainer.data.plan` and `trainer.data.allotment`, on one core. The
columns lie in files that are mapped, as those of a packed corpus's index are, so that the processes of a machine share
them; private memory is told apart. Each setting runs in a process of its own. Ends with one line of JSON: the largest
figure of any setting.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.data.allotment import allot
from trainer.data.augment import NO_AUGMENTATION, Augmentation
from trainer.data.cost import FRAMES_ONLY, CostModel
from trainer.data.lengths import draw_phoenix_lengths
from trainer.data.plan import GlobalBatch, Plan
from trainer.layout import slot_frames
from trainer.randomness import mix

TOTAL_STRIDE = 4
BAR = 10.0
SETTINGS: dict[str, tuple[str, ...]] = {
    "plain shuffle": (),
    "augmented": ("--augment",),
    "augmented, shuffle_window 8": ("--augment", "--shuffle_window", "8"),
    "the same, walks balanced too": ("--augment", "--shuffle_window", "8", "--walks"),
}
_STARTS = 5
_COLUMNS = ("num_frames", "min_outputs", "keys")
_CHUNK = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every setting, print a table, end with one line of JSON."""
    args = parse_args(argv)
    if args.worker:
        print(json.dumps(measure(args, Path(args.worker))))
        return 0
    size = args.clips_per_rank * args.world_size
    print(f"{args.clips} clips, {args.world_size} ranks, {size} clips a step: {-(-args.clips // size)} steps an epoch")
    print(f"{'':<30}{'epoch':>9}{'CPU':>9}{'start':>9}{'private':>11}{'mapped':>10}{'a clip':>9}{'imbalance':>11}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_columns(args, Path(folder))
        for name, flags in SETTINGS.items():
            row = launch(args, Path(folder), flags)
            rows.append(row)
            print(
                f"{name:<30}{row['plan_seconds_per_epoch']:7.2f} s{row['cpu_seconds_per_epoch']:7.2f} s"
                f"{row['start_seconds']:7.2f} s{row['private_mb']:8.0f} MB{row['mapped_mb']:7.0f} MB"
                f"{row['planning_bytes_per_clip']:7.1f} B{row['imbalance']:11.4f}",
                flush=True,
            )
    worst = {key: max(row[key] for row in rows) for key in rows[0]}
    clock, processor = worst["plan_seconds_per_epoch"], worst["cpu_seconds_per_epoch"]
    # On a machine that others use, the clock runs while this process waits for its turn.
    print(
        f"bar: under {BAR:.0f} s an epoch on one core: {verdict(clock)} by the clock ({clock:.1f} s), "
        f"{verdict(processor)} in processor time ({processor:.1f} s); load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores"
    )
    print(json.dumps({"clips": args.clips, "world_size": args.world_size, "epochs": args.epochs} | worst))
    return 0


def verdict(seconds: float) -> str:
    """Judge the seconds of an epoch by the bar."""
    return "met" if seconds < BAR else "MISSED"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=10_000_000, help="training clips")
    parser.add_argument("--world_size", type=int, default=4096, help="ranks")
    parser.add_argument("--clips_per_rank", type=int, default=8, help="clips of a rank in a step")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each setting, averaged")
    parser.add_argument("--seed", type=int, default=42)
    # What a setting turns on in its process.
    parser.add_argument("--augment", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--walks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shuffle_window", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.clips, args.world_size, args.clips_per_rank, args.epochs) < 1:
        parser.error("--clips, --world_size, --clips_per_rank and --epochs: expected 1 or more")
    return args


def write_columns(args: argparse.Namespace, folder: Path) -> None:
    """Write what the plan knows of the clips, a file a column, of the types a packed corpus's index has."""
    kinds = dict(zip(_COLUMNS, (np.int32, np.int32, np.uint64), strict=True))
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(args.clips,))
        for name, kind in kinds.items()
    }
    for start in range(0, args.clips, _CHUNK):
        part = slice(start, min(start + _CHUNK, args.clips))
        frames, glosses = draw_phoenix_lengths(part.stop - start, args.seed + start)
        files["num_frames"][part], files["min_outputs"][part] = frames, glosses
        files["keys"][part] = mix(np.arange(start, part.stop, dtype=np.uint64))
    for file in files.values():
        file.flush()


def launch(args: argparse.Namespace, folder: Path, flags: Sequence[str]) -> dict[str, float]:
    """Run one setting in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, __file__, "--worker", str(folder), *flags]
    for name in ("clips", "world_size", "clips_per_rank", "epochs", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    finished = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise SystemExit(f"{finished.stderr}\nthe process that measures failed, see above")
    figures: dict[str, float] = json.loads(finished.stdout)
    return figures


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Plan and share whole epochs; return seconds, and the memory beyond that of the imported packages."""
    before, highest = memory(), memory()
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
    size = args.clips_per_rank * args.world_size
    plan = Plan(
        **columns,
        total_stride=TOTAL_STRIDE,
        seed=args.seed,
        augmentation=Augmentation() if args.augment else NO_AUGMENTATION,
        shuffle_window=args.shuffle_window,
    )
    budget = args.clips_per_rank * int(slot_frames(np.array([plan.num_frames.max()]), TOTAL_STRIDE)[0])
    # An output frame of the walk as dear as 2.5 frames, as on a CPU; only that there is a term matters here.
    model = CostModel(per_slot=1.0, per_walk=2.5, per_cell=0.0, samples=0, residual=0.0) if args.walks else FRAMES_ONLY
    imbalances = []
    started, cpu = time.perf_counter(), time.process_time()
    for epoch in range(args.epochs):
        for batch in plan.batches(epoch, size):
            imbalance = share(batch, args.world_size, budget, model)
            highest = {kind: max(highest[kind], value) for kind, value in memory().items()}
            if len(batch) == size:
                imbalances.append(imbalance)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    starts = []
    for position in np.random.default_rng(args.seed).integers(0, max(1, args.clips - size), _STARTS).tolist():
        began = time.perf_counter()
        share(next(plan.batches(args.epochs, size, position)), args.world_size, budget, model)
        starts.append(time.perf_counter() - began)
    grown = {kind: (highest[kind] - before[kind]) / 1e6 for kind in before}
    # The peak between two steps, when an epoch's order is drawn, only the kernel has seen.
    whole = grown["VmHWM"]
    return {
        "plan_seconds_per_epoch": round(seconds / args.epochs, 3),
        "cpu_seconds_per_epoch": round(cpu / args.epochs, 3),
        "planning_memory_mb": round(whole, 1),
        "private_mb": round(grown["RssAnon"], 1),
        "mapped_mb": round(grown["RssFile"], 1),
        "planning_bytes_per_clip": round(whole * 1e6 / args.clips, 2),
        "start_seconds": round(statistics.median(starts), 3),
        "imbalance": round(float(np.mean(imbalances)), 4) if imbalances else 1.0,
    }


def share(batch: GlobalBatch, world_size: int, budget: int, model: CostModel) -> float:
    """Share a global batch as a rank does, down to the cells of its own; return the imbalance."""
    slots = slot_frames(batch.num_frames, TOTAL_STRIDE)
    sequential = model.sequential(-(-batch.num_frames // TOTAL_STRIDE)) if model.per_walk else None
    allotment = allot(slots, world_size=world_size, budget=budget, sequential=sequential)
    allotment.cells(0)
    return allotment.imbalance


def memory() -> dict[str, int]:
    """Return this process's resident memory in bytes: private, of mapped files, and the peak of both so far."""
    status = Path("/proc/self/status").read_text()
    return {kind: int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) * 1024 for kind in ("RssAnon", "RssFile", "VmHWM")}


if __name__ == "__main__":
    raise SystemExit(main())
