"""Loop: what the trainer's loop costs over a bare PyTorch loop on the same batches, on one process and on two.

The trainer runs as it is: `trainer.loop` with its loader, plan, fused all-reduce, schedule, metrics and trackers. The
bare loop has the same cells already in memory, the same model, objective, optimizer and clipping, plain DDP on two
processes, and one `loss.item()` a step. Both take turns step by step in the same processes, so that a noisy machine
disturbs both alike. Validation and checkpoints are left out. Beside the overhead in time stands that in processor
time, threads that read included, which other programs on the machine disturb less. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.assembly import build_run, make_training_loader
from trainer.data.batch import MicroBatch
from trainer.data.loader import StepShare, TrainingLoader
from trainer.data.synthetic import SyntheticSpec, write_corpus
from trainer.engine import Engine, open_engine
from trainer.objectives.ctc import ctc_objective
from trainer.observe.progress import Progress
from trainer.optimization import make_optimizer
from trainer.recipe import Recipe
from trainer.signals import StopRequest

WORLD_SIZES = (1, 2)
BAR = 0.03
_FIGURES = "figures.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the processes of both world sizes, print a table, end with one line of JSON."""
    args = parse_args(argv)
    if args.worker:
        run_worker(args, Path(args.worker))
        return 0
    print(
        f"load {_load()} on {os.cpu_count()} cores; {args.steps} steps of each loop after {args.warmup} for warming up"
    )
    headings = "".join(
        f"{name:>9}" for name in ("trainer", "bare", "overhead", "from", "to", "min", "max", "cpu", "reading")
    )
    print(f"{'processes':>9}{headings}")
    figures: dict[str, Any] = {"steps": args.steps, "num_workers": args.num_workers, "feature_dim": args.feature_dim}
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            figures |= report(world_size, launch(args, Path(folder), world_size))
    print(f"load {_load()}; from, to: 95 % interval of the median overhead; bar: overhead <= {100 * BAR:.0f} %")
    print(json.dumps(figures))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of each loop to measure, rounded up to even")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each loop before that")
    parser.add_argument("--clips_per_rank", type=int, default=4, help="clips of a rank in a step")
    parser.add_argument("--feature_dim", type=int, default=512, help="features per frame, D")
    parser.add_argument("--num_workers", type=int, default=2, help="reading threads of the trainer's loader")
    parser.add_argument(
        "--quick", action="store_true", help="a small model on short clips: to see it run, not to measure"
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.steps += args.steps % 2
    return args


def launch(args: argparse.Namespace, folder: Path, world_size: int) -> dict[str, Any]:
    """Start the processes of one world size, wait for them, and return what they measured."""
    write_clips(args, folder / "corpus", world_size)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command = [sys.executable, *(launcher if world_size > 1 else []), __file__, "--worker", str(folder)]
    for name in ("steps", "warmup", "clips_per_rank", "feature_dim", "num_workers"):
        command += [f"--{name}", str(getattr(args, name))]
    # One thread a process: two processes have a core each; one leaves the other core to its reading threads.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command + ["--quick"] * args.quick,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise SystemExit(f"{finished.stdout}\nthe processes of world size {world_size} failed, see above")
    figures: dict[str, Any] = json.loads((folder / _FIGURES).read_text())
    return figures


def write_clips(args: argparse.Namespace, folder: Path, world_size: int) -> None:
    """Write a synthetic corpus of full-size clips: several steps an epoch, none of them cut short."""
    clips = args.clips_per_rank * world_size * 6
    spec = SyntheticSpec(clips=clips, size="demo" if args.quick else "full", feature_dim=args.feature_dim)
    write_corpus(spec, folder, log=lambda _: None)


class Turn(NamedTuple):
    """Seconds of one step of one loop: on the clock, and of the processor in all threads."""

    wall: float
    cpu: float


def report(world_size: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Print a row and return its figures: the overhead is the median of the rounds' ratios, less one."""
    trainer, bare = ([Turn(*turn) for turn in measured[loop]] for loop in ("trainer", "bare"))
    rounds = list(zip(in_rounds(trainer), in_rounds(bare), strict=True))
    ratios = [ours.wall / theirs.wall - 1.0 for ours, theirs in rounds]
    overhead, (low, high) = statistics.median(ratios), median_interval(ratios)
    cpu_overhead = statistics.median(ours.cpu / theirs.cpu - 1.0 for ours, theirs in rounds)
    seconds, bare_seconds = (statistics.median(turn.wall for turn in loop) for loop in (trainer, bare))
    shares = (overhead, low, high, min(ratios), max(ratios), cpu_overhead, measured["data_wait"])
    columns = "".join(f"{100 * share:7.2f} %" for share in shares)
    print(f"{world_size:>9}{seconds:7.3f} s{bare_seconds:7.3f} s{columns}", flush=True)
    return {
        f"overhead_{world_size}": round(overhead, 5),
        f"overhead_interval_{world_size}": [round(low, 5), round(high, 5)],
        f"overhead_range_{world_size}": [round(min(ratios), 5), round(max(ratios), 5)],
        f"overhead_total_{world_size}": round(sum(t.wall for t in trainer) / sum(b.wall for b in bare) - 1.0, 5),
        f"cpu_overhead_{world_size}": round(cpu_overhead, 5),
        f"step_seconds_{world_size}": round(seconds, 4),
        f"bare_seconds_{world_size}": round(bare_seconds, 4),
        f"data_wait_{world_size}": round(measured["data_wait"], 5),
        f"weights_difference_{world_size}": measured["weights_difference"],
    }


def in_rounds(turns: Sequence[Turn]) -> list[Turn]:
    """Add up two steps each: in one of them the trainer went first, in the other the bare loop.

    Whoever goes first is up to 3 % faster: it finds other caches.
    """
    return [Turn(one.wall + two.wall, one.cpu + two.cpu) for one, two in zip(turns[::2], turns[1::2], strict=True)]


def median_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median, by order statistics: all of them if there are few."""
    ordered, count = sorted(ratios), len(ratios)
    first = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    return ordered[first], ordered[count - 1 - first]


def run_worker(args: argparse.Namespace, folder: Path) -> None:
    """Train as one rank with both loops; rank 0 writes what was measured."""
    recipe = make_recipe(args, folder, int(os.environ.get("WORLD_SIZE", "1")))
    engine = open_engine(recipe)
    run = build_run(recipe, engine, Progress(enabled=engine.is_main), StopRequest())
    turns = TakingTurns(
        loader=run.loader,
        reference=make_training_loader(recipe, run.corpus, engine),
        bare_loop=BareLoop(copy.deepcopy(engine.module), recipe, engine.world_size),
        engine=engine,
    )
    # The loop asks its loader for every step: there, and nowhere inside the trainer, the bare loop gets its turn.
    run.loader = turns  # type: ignore[assignment]
    run.run()
    # The trainer's last step ends the run and is not measured, though the bare loop may have had its turn by then.
    measured = slice(args.warmup, args.warmup + args.steps)
    trainer, bare = (slowest_of_ranks(engine.gather_objects(loop))[measured] for loop in (turns.trainer, turns.bare))
    if engine.is_main:
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        waits = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line]
        figures = {
            "trainer": trainer,
            "bare": bare,
            "weights_difference": turns.weights_difference,
            "data_wait": statistics.median(waits[measured]),
        }
        (folder / _FIGURES).write_text(json.dumps(figures))
    for tracker in run.trackers:
        tracker.close()
    engine.close()


def make_recipe(args: argparse.Namespace, folder: Path, world_size: int) -> Recipe:
    """Write the recipe: the teacher at its full size, without augmentation so that both loops see the same batches."""
    values: dict[str, Any] = {
        "data_dir": str(folder / "corpus"),
        "output_dir": str(folder / "run"),
        "batch_size": args.clips_per_rank,
        "gradient_accumulation_steps": world_size,
        "num_workers": args.num_workers,
        # The bare loop has no schedule; with a constant rate both must arrive at the same weights.
        "scheduler": "constant",
        "warmup_epochs": 0.0,
        "epochs": args.steps + args.warmup + 1,
        # The run ends in the last step, with a validation and a checkpoint: it is not measured.
        "max_steps": args.steps + args.warmup + 1,
        "evaluate_every": 10**9,
        "train_wer_clips": 0,
        # A line of metrics at every step, where the default is every 50 steps: nothing the loop does is left out.
        "log_every": 1,
    }
    if args.quick:
        values |= {"width": 0.125, "rnn_size": 32, "rnn_layers": 1}
    return Recipe.from_flat(values)


class BareLoop:
    """The loop one would write by hand: forward, backward, clip, step, print the loss."""

    def __init__(self, model: nn.Module, recipe: Recipe, world_size: int) -> None:
        self.model: nn.Module = model
        self.optimizer = make_optimizer(model, recipe.optimization)
        self.max_norm = recipe.optimization.gradient_clip
        self.world_size = world_size
        if world_size > 1:
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(self, cells: Sequence[MicroBatch], denominator: float) -> float:
        """Take one optimizer step on cells that are in memory; return the last loss, as a log would have it."""
        loss = torch.zeros(())
        for number, cell in enumerate(cells, start=1):
            with self._communicating(number == len(cells)):
                logits = self.model(cell.features, cell.layout)
                loss = ctc_objective(logits, cell.layout.output_lengths, cell.labels) * (self.world_size / denominator)
                loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _communicating(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        return contextlib.nullcontext()


@dataclass(kw_only=True)
class TakingTurns:
    """A training loader that gives the bare loop its turn before or after each step of the trainer.

    `loader` is the trainer's; `reference` reads the same cells for the bare loop, outside the time of either.
    """

    loader: TrainingLoader
    reference: TrainingLoader
    bare_loop: BareLoop
    engine: Engine

    def __post_init__(self) -> None:
        self.split, self.plan = self.loader.split, self.loader.plan
        self.reference.cell_loader.num_workers = 0
        self.trainer: list[Turn] = []
        self.bare: list[Turn] = []
        self.weights_difference = 0.0

    def steps(
        self, epoch: int, position: int, **where: int
    ) -> Generator[tuple[StepShare, Iterator[MicroBatch]], None, None]:
        """Yield what the trainer's loader yields; the time until the trainer asks again is its step."""
        with contextlib.closing(self.loader.steps(epoch, position, **where)) as steps:
            for share, cells in self.reference.steps(epoch, position, **where):
                loaded = [dataclasses.replace(cell, features=cell.features.clone()) for cell in cells]
                bare_first = len(self.trainer) % 2 == 1
                if bare_first:
                    self._take_bare_turn(share, loaded)
                started = self._start()
                yield next(steps)
                self.trainer.append(_since(started))
                if not bare_first:
                    self._take_bare_turn(share, loaded)
                self.weights_difference = relative_difference(self.engine.module, self.bare_loop.model)

    def _take_bare_turn(self, share: StepShare, cells: list[MicroBatch]) -> None:
        # The trainer's recipe asks for determinism; a bare loop would not pay for it.
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        started = self._start()
        self.bare_loop.step(cells, share.denominator)
        self.bare.append(_since(started))
        torch.use_deterministic_algorithms(deterministic)

    def _start(self) -> Turn:
        """Wait until all ranks are here, so that none pays for what others did before; then look at the clocks."""
        if self.engine.world_size > 1:
            dist.barrier()
        return _now()


def relative_difference(one: nn.Module, other: nn.Module) -> float:
    """Return how far the weights of two models are apart, over their norm: whether both loops did the same work.

    The largest difference would not tell: Adam turns a gradient that is nothing but rounding into a step of full size.
    """
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    apart = sum(float((a.detach() - b.detach()).double().square().sum()) for a, b in pairs)
    return math.sqrt(apart / sum(float(a.detach().double().square().sum()) for a, _ in pairs))


def slowest_of_ranks(turns_of_ranks: Sequence[Sequence[Turn]]) -> list[Turn]:
    """Return for each step the time of the slowest rank, and the processor time of all."""
    return [
        Turn(max(turn.wall for turn in ranks), sum(turn.cpu for turn in ranks))
        for ranks in zip(*turns_of_ranks, strict=True)
    ]


def _now() -> Turn:
    return Turn(time.perf_counter(), time.process_time())


def _since(started: Turn) -> Turn:
    return Turn(*(now - then for now, then in zip(_now(), started, strict=True)))


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
