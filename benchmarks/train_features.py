"""Training on features end to end: clips per second of this trainer, a plain Accelerate loop and Lightning's Trainer.

Two ranks on the CPU (gloo, one thread each), started alike by `accelerate launch`. Every way trains the same module
(`FeatureTeacher`, small) from the same seed with the same optimizer, gradient clipping, loss (CTC per gloss, mean over
clips), dropout and float32 precision, on features normalised by the same mean and scale, in steps of 16 clips, without
augmentation. The corpus is synthetic, with PHOENIX-2014's lengths and 6,516 features a frame, and lies in memory (the
page cache). Validation and checkpoints are left out.

What differs is how the clips come and lie. Ours: the trainer as it is (`trainer.assembly.build_run`), a float16 corpus
packed by `signscale pack`, clips end to end, shared out by length. Theirs: a compressed npz file per clip, a `Dataset`
that normalises, a shuffling `DataLoader` that pads 8 random clips a rank to their longest, and the module computing on
what is padded, its loss on true lengths; without and with worker processes, of which the faster counts. The ways take
turns, each in processes of its own, and only steps after the first ones are timed. Beside the time on the clock stands
processor time, in all ranks, threads and workers, which other programs on the machine disturb less.

`data_wait_fraction` is the trainer's own: of a run of the full teacher by `configs/teacher_conservative.yaml`, with its
augmentation, on the packed corpus and two ranks. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from usual_training import Clock, NpzClips, now, train_with_accelerate, train_with_lightning

from launch.pack import main as pack
from trainer.assembly import build_run
from trainer.data.batch import MicroBatch
from trainer.data.loader import StepShare, TrainingLoader
from trainer.data.normalization import Normalization, from_moments
from trainer.data.opening import OpenCorpus
from trainer.data.synthetic import SyntheticSpec, write_corpus
from trainer.engine import open_engine
from trainer.observe.progress import Progress
from trainer.recipe import CorpusRecipe, Recipe
from trainer.signals import StopRequest

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
CLIPS_PER_RANK = 8
CLIPS_PER_STEP = RANKS * CLIPS_PER_RANK
BAR = 2.5
WAIT_BAR = 0.02
OURS = "ours"
BASELINES = ("accelerate", "lightning")
"""Ways to compare with, by the package that each takes."""
_NEVER = 10**9
_TINY = {"width": 0.02, "rnn_size": 12, "rnn_layers": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, end with one line of JSON."""
    args = parse_args(argv)
    if args.way:
        run_worker(args)
        return 0
    missing = [package for package in BASELINES if importlib.util.find_spec(package) is None]
    baselines = [package for package in BASELINES if package not in missing]
    for package in missing:
        print(f"{package} is not installed and left out: pip install --constraint constraints.txt -e '.[benchmarks]'")
    with contextlib.ExitStack() as stack:
        if args.folder is None:
            args.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        corpora = write_corpora(args)
        figures: dict[str, Any] = {"load_before": round(os.getloadavg()[0], 1), "missing": missing}
        print(
            f"load {figures['load_before']} on {os.cpu_count()} cores; {args.rounds} rounds of {args.steps} steps of "
            f"{CLIPS_PER_STEP} clips after {args.warmup} for warming up; {args.clips} clips an epoch"
        )
        figures |= report(measure(args, corpora, baselines))
        figures |= report_wait(args, corpora)
    figures["load_after"] = round(os.getloadavg()[0], 1)
    print(f"load {figures['load_after']}; bars: >= {BAR} times both, waiting <= {100 * WAIT_BAR:.0f} %")
    print(json.dumps(figures))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clips", type=int, default=320, help=f"training clips, rounded up to a multiple of {CLIPS_PER_STEP}")
    add("--feature_dim", type=int, default=6516, help="features per frame, D")
    add("--rounds", type=int, default=5, help="turns of every way")
    add("--steps", type=int, default=40, help="steps measured in each turn")
    add("--warmup", type=int, default=5, help="steps of each turn before that")
    add("--workers", type=int, nargs="+", default=[0, 2], help="worker processes to try in the others' DataLoader")
    add("--width", type=float, default=0.125, help="width of the small model, of the teacher's")
    add("--rnn_size", type=int, default=64, help="LSTM units of the small model, in one layer")
    add("--teacher_steps", type=int, default=16, help="steps of the full teacher whose waiting is measured")
    add("--teacher_warmup", type=int, default=3, help="steps of the full teacher before that")
    add("--uncompressed", action="store_true", help="npz files without compression: a harder comparison than the usual")
    add("--folder", type=Path, help="where to keep the corpora for the next call (default: nowhere)")
    add("--quick", action="store_true", help="short clips and tiny models: to see it run, not to measure")
    add("--way", default="", help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.clips += -args.clips % CLIPS_PER_STEP
    if args.warmup < 1 or args.steps < 1 or args.rounds < 1:
        parser.error("--warmup, --steps and --rounds: expected 1 or more of each")
    return args


class Corpora(NamedTuple):
    """The same clips as labs have them, and packed."""

    npz: Path
    packed: Path


def corpora_of(args: argparse.Namespace) -> Corpora:
    """Say where the corpora lie."""
    return Corpora(args.folder / ("npz_uncompressed" if args.uncompressed else "npz"), args.folder / "packed_float16")


def write_corpora(args: argparse.Namespace) -> Corpora:
    """Write the corpus as npz and pack it; what is there from an earlier call stays."""
    corpora = corpora_of(args)
    if not corpora.npz.exists():
        raw = args.folder / "raw"
        spec = SyntheticSpec(
            clips=args.clips, size="demo" if args.quick else "full", feature_dim=args.feature_dim, seed=1
        )
        write_corpus(spec, raw, log=lambda _: None)
        if not args.uncompressed:
            with ThreadPoolExecutor() as pool:
                list(pool.map(compress, sorted(raw.rglob("*.npz"))))
        raw.rename(corpora.npz)
    if not corpora.packed.exists() and pack([str(corpora.npz), str(corpora.packed)]):
        raise SystemExit(f"{corpora.npz} was not packed, see above")
    for name, found, asked in (
        ("clips", len(list((corpora.npz / "train").glob("*.npz"))), args.clips),
        ("feature_dim", normalization_of(corpora).feature_dim, args.feature_dim),
    ):
        if found != asked:
            raise SystemExit(
                f"--{name} {asked}: the corpus in --folder {args.folder} was written with {found}; change one of them"
            )
    return corpora


def normalization_of(corpora: Corpora) -> Normalization:
    """Return the normalisation that the trainer uses on the packed corpus."""
    moments = OpenCorpus(CorpusRecipe(data_dir=str(corpora.packed)), print).moments
    assert moments is not None, "a packed corpus has the moments of its training clips"
    return from_moments("corpus", [moments], len(moments.mean))


def compress(path: Path) -> None:
    """Save a feature file again as labs have them."""
    with np.load(path) as archive:
        features = archive["features"]
    np.savez_compressed(path, features=features)


# Turns, from the side of the process that starts the ranks.


class Speed(NamedTuple):
    """Clips per second of one turn: on the clock, and of processor time in all ranks."""

    wall: float
    cpu: float


def measure(args: argparse.Namespace, corpora: Corpora, baselines: Sequence[str]) -> dict[str, list[Speed]]:
    """Let all ways take turns; return the speed of each turn."""
    ways = [OURS, *(f"{name} {workers}" for name in baselines for workers in args.workers)]
    speeds: dict[str, list[Speed]] = {way: [] for way in ways}
    for turn in range(args.rounds):
        # What else the machine did in the meantime may have taken the corpora out of memory.
        for path in (path for folder in corpora for path in folder.rglob("*") if path.is_file()):
            path.read_bytes()
        # Every other round in the opposite order: none always comes after the same one.
        for way in ways if turn % 2 == 0 else reversed(ways):
            speed = take_turn(args, way)
            speeds[way].append(speed)
            print(f"round {turn + 1}, {way}: {speed.wall:.1f} clips/s", file=sys.stderr, flush=True)
    return speeds


def take_turn(args: argparse.Namespace, way: str) -> Speed:
    """Start the ranks of one way and return the speed of the steps that count."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name}={getattr(args, name)}" for name in ("clips", "steps", "warmup", "width", "rnn_size")]
        flags += [f"--folder={args.folder}", f"--way={way}", f"--out={folder}"]
        flags += ["--quick"] * args.quick + ["--uncompressed"] * args.uncompressed
        launch([__file__, *flags])
        walls, cpus = zip(
            *(json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)), strict=True
        )
    clips = CLIPS_PER_STEP * args.steps
    return Speed(clips / max(walls), clips / sum(cpus))


def launch(command: Sequence[str]) -> None:
    """Run two ranks on the CPU to their end."""
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(RANKS)]
    finished = subprocess.run(
        [sys.executable, *launcher, *command],
        # One thread a rank: there are as many cores as ranks, and readers beside them.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise SystemExit(f"{finished.stdout}\nthe ranks failed, see above: {' '.join(command)}")


def report(speeds: dict[str, list[Speed]]) -> dict[str, Any]:
    """Print a row for each way and return the figures: medians, and their ratios to the faster of each baseline."""
    print(
        f"{'':>14}{'clips/s':>9}{'from':>7}{'to':>7}{'a CPU s':>9}{'ours over':>11}{'from':>6}{'to':>6}{'in CPU s':>10}"
    )
    figures: dict[str, Any] = {}
    walls, cpus = ({way: [speed[i] for speed in turns] for way, turns in speeds.items()} for i in range(2))
    for way, turns in walls.items():
        median, cpu = statistics.median(turns), statistics.median(cpus[way])
        ratio, low, high = compare(walls[OURS], turns)
        print(
            f"{way:>14}{median:>9.1f}{min(turns):>7.1f}{max(turns):>7.1f}{cpu:>9.1f}{ratio:>11.2f}{low:>6.2f}{high:>6.2f}"
            f"{compare(cpus[OURS], cpus[way])[0]:>10.2f}",
            flush=True,
        )
        name = way.replace(" ", "_")
        figures[f"clips_per_second_{name}"] = round(median, 2)
        figures[f"clips_per_second_{name}_range"] = [round(min(turns), 2), round(max(turns), 2)]
        figures[f"clips_per_cpu_second_{name}"] = round(cpu, 2)
    for name in BASELINES:
        variants = [way for way in speeds if way.startswith(name)]
        best = max(variants, key=lambda way: statistics.median(walls[way]), default=None)
        ratios = list(compare(walls[OURS], walls[best])) if best else [None] * 3
        figures[f"over_{name}"], figures[f"over_{name}_range"] = ratios[0], ratios[1:]
        figures[f"over_{name}_cpu"] = compare(cpus[OURS], cpus[best])[0] if best else None
    return figures


def compare(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of the medians, and the smallest and largest ratio within a round."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return (
        round(statistics.median(ours) / statistics.median(theirs), 3),
        round(min(rounds), 3),
        round(max(rounds), 3),
    )


def report_wait(args: argparse.Namespace, corpora: Corpora) -> dict[str, Any]:
    """Train the full teacher by its recipe, as a user does; return which share of their time ranks wait for clips."""
    steps = args.teacher_warmup + args.teacher_steps
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        values = {
            "config": ROOT / "configs" / "teacher_conservative.yaml",
            "data_dir": corpora.packed,
            "output_dir": run,
            "max_steps": steps,
            "log_every": 1,
            "evaluate_every": _NEVER,
            "train_wer_clips": 0,
            "trackers": [],
        }
        values |= _TINY if args.quick else {}
        launch(["-m", "trainer.train", *(f"--{name}={value}" for name, value in values.items())])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line][args.teacher_warmup :]
    mean = statistics.mean(waits)
    print(
        f"full teacher with augmentation: waits {100 * mean:.2f} % of the time for clips ({100 * min(waits):.2f} to "
        f"{100 * max(waits):.2f} % in each of {len(waits)} steps)"
    )
    return {"data_wait_fraction": round(mean, 5), "data_wait_range": [round(min(waits), 5), round(max(waits), 5)]}


# Turns, from the side of a rank.


def run_worker(args: argparse.Namespace) -> None:
    """Train as one rank in one way; write the seconds of the steps that count."""
    name, _, workers = args.way.partition(" ")
    ways: dict[str, Callable[[], list[Clock]]] = {
        OURS: lambda: train_ours(args),
        "accelerate": lambda: train_usually(args, train_with_accelerate, int(workers)),
        "lightning": lambda: train_usually(args, train_with_lightning, int(workers)),
    }
    ends = ways[name]()
    first, last = ends[args.warmup - 1], ends[args.warmup + args.steps - 1]
    (args.out / f"{os.environ['RANK']}.json").write_text(json.dumps([last.wall - first.wall, last.cpu - first.cpu]))


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Write the recipe of the small model; every way takes from it what it needs."""
    values: dict[str, Any] = {
        "data_dir": str(corpora_of(args).packed),
        "batch_size": CLIPS_PER_RANK,
        "gradient_accumulation_steps": RANKS,
        "width": args.width,
        "rnn_size": args.rnn_size,
        "rnn_layers": 1,
        # Theirs have no schedule.
        "scheduler": "constant",
        "warmup_epochs": 0.0,
        "epochs": _NEVER,
        # The run ends in one step more, with a validation and a checkpoint.
        "max_steps": args.warmup + args.steps + 1,
        "evaluate_every": _NEVER,
        "train_wer_clips": 0,
        "trackers": [],
    }
    if args.out:
        values["output_dir"] = str(args.out / "run")
    return Recipe.from_flat(values | (_TINY if args.quick else {}))


def train_ours(args: argparse.Namespace) -> list[Clock]:
    """Train with this trainer; return when each step ended."""
    recipe = make_recipe(args)
    engine = open_engine(recipe)
    run = build_run(recipe, engine, Progress(enabled=engine.is_main), StopRequest())
    watched = WatchedLoader(run.loader)
    run.loader = watched  # type: ignore[assignment]
    run.run()
    for tracker in run.trackers:
        tracker.close()
    engine.close()
    return watched.ends


class WatchedLoader:
    """A training loader that notes when the loop comes back for the next step."""

    def __init__(self, loader: TrainingLoader) -> None:
        self.split, self.plan = loader.split, loader.plan
        self.ends: list[Clock] = []
        self._loader = loader

    def steps(
        self, epoch: int, position: int, **where: int
    ) -> Generator[tuple[StepShare, Iterator[MicroBatch]], None, None]:
        """Yield what the trainer's loader yields."""
        with contextlib.closing(self._loader.steps(epoch, position, **where)) as steps:
            for step in steps:
                yield step
                self.ends.append(now())


def train_usually(args: argparse.Namespace, train: Callable[..., list[Clock]], workers: int) -> list[Clock]:
    """Train in one of the usual ways; return when each step ended."""
    corpora = corpora_of(args)
    clips = NpzClips(corpora.npz, normalization_of(corpora))
    return train(make_recipe(args), clips, steps=args.warmup + args.steps, workers=workers)


if __name__ == "__main__":
    raise SystemExit(main())
