"""Batching: the time of a step over the ideal, the padding, and whether the shuffle stays uniform.

Counts frames and runs no model. Ours are the global batches that `trainer.data.plan` draws, shared by
`trainer.data.allotment`; beside them the same global batches shared the plain way (each rank pads its random clips to
the longest of them) and sorted by length and cut (padded too). Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.data.allotment import allot
from trainer.data.lengths import draw_phoenix_lengths
from trainer.data.plan import Plan
from trainer.layout import slot_frames
from trainer.randomness import clip_keys

Frames = npt.NDArray[np.int64]
Share = Callable[[Frames, int], Frames]
"""Shares the clips of a global batch, `[n]` real frames, among ranks: the frames each rank computes, `[world size]`."""

WORLD_SIZES = (1, 2, 8, 64)
CLIPS_PER_RANK = 8
TOTAL_STRIDE = 4
BARS = {8: 1.15, 64: 1.06}
PHOENIX_CLIPS = 5672
_PARTS = 10


class Figures(NamedTuple):
    """What one way of sharing costs at one world size, averaged over steps."""

    step_over_ideal: float
    """The slowest rank's computed frames over the mean of real frames per rank."""
    padding: float
    """Share of the computed frames, over all ranks, that are no clip's frames."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, end with one line of JSON."""
    args = parse_args(argv)
    frames = (
        read_lengths(args.lengths, args.split) if args.lengths else draw_phoenix_lengths(PHOENIX_CLIPS, args.seed)[0]
    )
    plan = make_plan(frames, args.seed, args.shuffle_window)
    source = f"{args.lengths}, split {args.split}" if args.lengths else "generated"
    print(f"{len(frames)} clips ({source}), {frames.mean():.1f} frames on average, sd {frames.std():.1f}")
    figures: dict[str, object] = {"clips": len(frames), "lengths": source, "epochs": args.epochs}
    figures["shuffle_window"] = args.shuffle_window
    figures |= report_sharing(plan, args.epochs)
    figures |= report_shuffle(plan, args.shuffle_epochs)
    print(json.dumps(figures))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=Path, help="CSV with the columns split and num_frames (default: generated)")
    parser.add_argument("--split", default="train", help="the split of --lengths to use")
    parser.add_argument("--epochs", type=at_least_two, default=10, help="epochs that the averages run over")
    parser.add_argument(
        "--shuffle_epochs", type=at_least_two, default=1000, help="epochs for the uniformity of the shuffle"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--shuffle_window", type=int, default=1, help="global batches sorted by length together")
    return parser.parse_args(argv)


def at_least_two(text: str) -> int:
    """Read a number of epochs; a spread needs two."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is too few; use 2 or more")
    return value


def read_lengths(path: Path, split: str) -> Frames:
    """Read the frames of every clip of a split."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            frames = [int(row["num_frames"]) for row in csv.DictReader(file) if row["split"] == split]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{path}: expected a CSV with the columns split and num_frames ({error!r})") from error
    if len(frames) < CLIPS_PER_RANK * max(WORLD_SIZES):
        raise SystemExit(
            f"{path}: {len(frames)} clips in split {split!r}; one global batch of {max(WORLD_SIZES)} ranks needs "
            f"{CLIPS_PER_RANK * max(WORLD_SIZES)}"
        )
    return np.array(frames, dtype=np.int64)


def make_plan(frames: Frames, seed: int, shuffle_window: int = 1) -> Plan:
    """Plan as the trainer does, without augmentation or mixup; for these, glosses would matter."""
    return Plan(
        num_frames=frames,
        min_outputs=np.ones_like(frames),
        keys=clip_keys([f"clip-{index}" for index in range(len(frames))]),
        total_stride=TOTAL_STRIDE,
        seed=seed,
        shuffle_window=shuffle_window,
    )


def share_ours(frames: Frames, world_size: int) -> Frames:
    """Return the slots, guards included, that the packed time axis of each rank holds."""
    slots = slot_frames(frames, TOTAL_STRIDE)
    # The trainer's default budget. It cuts a rank's clips into cells and does not change what a rank computes.
    return allot(slots, world_size=world_size, budget=CLIPS_PER_RANK * int(slots.max())).loads


def share_at_random(frames: Frames, world_size: int) -> Frames:
    """Pad the clips of each rank, in the order drawn, to the longest of them."""
    return frames.reshape(world_size, -1).max(axis=1) * (len(frames) // world_size)


def share_sorted(frames: Frames, world_size: int) -> Frames:
    """Sort the global batch by length and cut it into padded runs, one a rank, whose largest cost is least."""
    longest_first = np.sort(frames)[::-1].tolist()
    low, high = longest_first[0], longest_first[0] * len(frames)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(longest_first, middle)) <= world_size else (middle + 1, high)
    loads = _runs(longest_first, low)
    # Cutting so may need fewer runs than there are ranks; the rest has nothing to do.
    return np.array(loads + [0] * (world_size - len(loads)), dtype=np.int64)


def _runs(longest_first: list[int], limit: int) -> list[int]:
    """Return the padded costs of runs of at most `limit`, filled one after the other."""
    costs, start = [], 0
    while start < len(longest_first):
        count = min(limit // longest_first[start], len(longest_first) - start)
        costs.append(count * longest_first[start])
        start += count
    return costs


def global_batches(plan: Plan, world_size: int, epochs: int) -> Iterator[Frames]:
    """Yield the real frames of each full global batch of several epochs."""
    size = CLIPS_PER_RANK * world_size
    for epoch in range(epochs):
        for batch in plan.batches(epoch, size):
            # An epoch's last step has fewer clips than 8 a rank: a small batch shares badly whatever the method.
            if len(batch) == size:
                yield batch.num_frames


def measure(plan: Plan, world_size: int, epochs: int, share: Share) -> Figures:
    """Average one way of sharing over the full steps of several epochs."""
    ratios, real, computed = [], 0, 0
    for frames in global_batches(plan, world_size, epochs):
        loads = share(frames, world_size)
        ratios.append(float(loads.max()) * world_size / float(frames.sum()))
        real, computed = real + int(frames.sum()), computed + int(loads.sum())
    return Figures(float(np.mean(ratios)), 1.0 - real / computed)


def measure_planning(plan: Plan, world_size: int) -> float:
    """Return the milliseconds a step that a rank spends on plan and allotment, over one epoch."""
    started = time.perf_counter()
    steps = sum(share_ours(frames, world_size).size > 0 for frames in global_batches(plan, world_size, 1))
    return 1000.0 * (time.perf_counter() - started) / steps


def longest_over_mean(plan: Plan, world_size: int, epochs: int) -> float:
    """Return a step's longest clip over its mean clip: what a purely sequential layer pays.

    The longest clip of a global batch is on some rank however clips are shared, so that this figure is the same for
    all of them.
    """
    batches = global_batches(plan, world_size, epochs)
    return float(np.mean([frames.max() / frames.mean() for frames in batches]))


def report_sharing(plan: Plan, epochs: int) -> dict[str, float]:
    """Measure all ways of sharing at all world sizes and print the table."""
    methods: dict[str, Share] = {"ours": share_ours, "random": share_at_random, "sorted": share_sorted}
    print(
        f"\nStep time over ideal, {CLIPS_PER_RANK} clips a rank (full global batches of {epochs} epochs); padding in %"
    )
    print(f"{'ranks':>5} {'ours':>13} {'random':>13} {'sorted, cut':>13} {'planning':>10} {'longest/mean':>13}   bar")
    figures: dict[str, float] = {}
    for world_size in WORLD_SIZES:
        row = {name: measure(plan, world_size, epochs, share) for name, share in methods.items()}
        planning, longest = measure_planning(plan, world_size), longest_over_mean(plan, world_size, epochs)
        columns = " ".join(f"{f.step_over_ideal:6.3f} {100 * f.padding:4.1f} %" for f in row.values())
        bar = BARS.get(world_size)
        verdict = "" if bar is None else f"<= {bar}: {'met' if row['ours'].step_over_ideal <= bar else 'MISSED'}"
        print(f"{world_size:>5} {columns} {planning:7.2f} ms {longest:13.2f}   {verdict}")
        figures[f"step_over_ideal_{world_size}"] = round(row["ours"].step_over_ideal, 4)
        figures[f"padding_{world_size}"] = round(row["ours"].padding, 4)
        for name in ("random", "sorted"):
            figures[f"{name}_{world_size}"] = round(row[name].step_over_ideal, 4)
            figures[f"padding_{name}_{world_size}"] = round(row[name].padding, 4)
        figures[f"planning_ms_{world_size}"] = round(planning, 3)
        figures[f"longest_over_mean_{world_size}"] = round(longest, 3)
    return figures


def report_shuffle(plan: Plan, epochs: int) -> dict[str, object]:
    """Measure how far the shuffle is from a uniform one, in standard deviations, and print it.

    Over many epochs: each clip's mean position; the counts of each clip in each tenth of an epoch (chi-square of the
    whole table); and whether clips of like length meet in a batch more often than chance has it.
    """
    clips, size = plan.num_clips, CLIPS_PER_RANK * 8
    position_sums = np.zeros(clips)
    counts = np.zeros((clips, _PARTS))
    spreads = []
    for epoch in range(epochs):
        order = plan.order(epoch)
        position_sums[order] += np.arange(clips)
        counts[order, np.arange(clips) * _PARTS // clips] += 1.0
        full = plan.num_frames[order[: clips // size * size]].reshape(-1, size)
        spreads.append(((full.mean(axis=1) - plan.num_frames.mean()) ** 2).mean())
    deviation = np.abs(position_sums / epochs - (clips - 1) / 2) / math.sqrt((clips**2 - 1) / 12 / epochs)
    low, high = expected_maximum(clips)
    figures = {
        "shuffle_max_sigma": round(float(deviation.max()), 3),
        "shuffle_max_sigma_expected": [round(low, 3), round(high, 3)],
        "shuffle_parts_sigma": round(parts_sigma(counts, epochs), 3),
        "shuffle_length_sigma": round(length_sigma(np.array(spreads), plan.num_frames, size), 3),
        "shuffle_epochs": epochs,
    }
    print(f"\nShuffle over {epochs} epochs, in standard deviations from a uniform one")
    for what, sigma, expected in (
        (f"largest of {clips} clips' mean positions", "shuffle_max_sigma", f"{low:.2f} to {high:.2f}"),
        ("chi-square of clips x tenths of an epoch", "shuffle_parts_sigma", "-2 to 2"),
        (f"clips of like length in one batch of {size}", "shuffle_length_sigma", "-2 to 2"),
    ):
        print(f"  {what:<42} {figures[sigma]:6.2f}   (uniform: {expected} in 95 %)")
    return figures


def expected_maximum(count: int) -> tuple[float, float]:
    """Return the central 95 % of the largest of `count` absolute standard normal numbers."""
    low, high = (NormalDist().inv_cdf((1.0 + q ** (1.0 / count)) / 2.0) for q in (0.025, 0.975))
    return low, high


def parts_sigma(counts: npt.NDArray[np.float64], epochs: int) -> float:
    """Return the chi-square of counts `[N, parts]`, centred and scaled by what a uniform shuffle gives."""
    clips, parts = counts.shape
    expected = np.bincount(np.arange(clips) * parts // clips) / clips * epochs
    statistic = float((((counts - expected) ** 2) / expected).sum())
    # Each clip is in one part an epoch: parts - 1 degrees of freedom a clip.
    freedom = clips * (parts - 1)
    return (statistic - freedom) / math.sqrt(2.0 * freedom)


def length_sigma(spreads: npt.NDArray[np.float64], frames: Frames, size: int) -> float:
    """Return how far the spread of the batches' mean lengths, `[epochs]`, is above that of random batches.

    Sorting clips by length over several batches makes the means of batches differ, and this figure go to hundreds.
    """
    # Drawn without replacement; the standard error comes from the epochs, which are independent.
    expected = frames.var() / size * (len(frames) - size) / (len(frames) - 1)
    error = float(spreads.std(ddof=1)) / math.sqrt(len(spreads))
    return float(spreads.mean() - expected) / error


if __name__ == "__main__":
    raise SystemExit(main())
