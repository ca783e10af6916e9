"""`signscale estimate`: what a recipe needs of memory under each backend, before a GPU is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.lengths import Lengths, read_length_table, read_lengths
from launch.plan import make_plan
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser, positive_count, positive_number
from trainer.recipe import VIDEO_MODELS, Recipe, combination_problems

# What needs torch is imported once the command line is known to be right.
if TYPE_CHECKING:
    from trainer.memory.activations import Counted
    from trainer.memory.static import Backend, StaticMemory
    from trainer.memory.worst import WorstCells

_MARGIN = 0.1
_CONFIGURATIONS = Path(__file__).resolve().parents[1] / "ds_configs"
_ZERO = {
    "ZeRO-1": ("zero1", {"stage": 1}),
    "ZeRO-2": ("zero2", {"stage": 2}),
    "ZeRO-3": ("zero3", {"stage": 3}),
    "ZeRO-2, CPU offload": ("zero2_offload", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "ZeRO-3, CPU offload": (
        "zero3_offload",
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ),
}
"""The shipped configuration of each, and what stands in where there is none."""
_HEADINGS = (
    *("ranks", "backend", "parameters", "gradients", "optimizer", "buffers"),
    *("activations", "read ahead", "sum", "host", "fits"),
)


def main(argv: Sequence[str]) -> int:
    """Print what a recipe needs under each backend; raises `InputError` for a user's mistake."""
    options, recipe = _parse(argv)
    if options.lengths:
        lengths = read_length_table(options.lengths, options.feature_dim, options.vocabulary)
    else:
        lengths = read_lengths(recipe.corpus)
    report = make_report(options, recipe, lengths)
    print(json.dumps(report, indent=1, allow_nan=False) if options.json else _format(report))
    return 0


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What passes take, with activation checkpointing off and on; None where that was not measured."""

    plain: Counted | None
    checkpointed: Counted | None
    reading: float
    """Bytes per slot of the cells that are read ahead."""

    def bytes(self, slots: int, padding: float, *, checkpointing: bool) -> float | None:
        """Return what a pass over so many slots takes."""
        from trainer.memory.model import Load

        counted = self.checkpointed if checkpointing else self.plain
        return None if counted is None else counted.passes.peak(Load(slots=slots, padded=round(slots * padding)))


def make_report(options: argparse.Namespace, recipe: Recipe, lengths: Lengths) -> dict[str, Any]:
    """Work out what is printed: the model, its passes, and a row per backend and world size."""
    if lengths.feature_dim is None or lengths.num_classes is None:
        raise InputError(
            f"{lengths.source}: the size of the model is not known; give --feature_dim D and --vocabulary V, which a "
            "table of lengths does not say"
        )
    plan = make_plan(recipe, lengths)
    # torch takes seconds, and is not needed to refuse a corpus.
    from trainer.layout import slot_frames
    from trainer.memory.activations import count_activations, read_ahead, size_of
    from trainer.memory.worst import find_worst

    dim, classes = lengths.feature_dim, lengths.num_classes
    size = size_of(recipe, feature_dim=dim, num_classes=classes)
    plain, checkpointed = (
        count_activations(recipe, feature_dim=dim, num_classes=classes, checkpointing=on) if options.measure else None
        for on in (False, True)
    )
    on_cuda = options.device == "cuda"
    itemsize = 1 if recipe.model.model in VIDEO_MODELS else 4
    reading = read_ahead(dim, num_workers=recipe.corpus.num_workers, on_cuda=on_cuda, itemsize=itemsize)
    passes = Passes(plain=plain, checkpointed=checkpointed, reading=reading)
    longest = int(slot_frames(np.array([plan.num_frames.max()]), plan.total_stride)[0])
    budget = int(recipe.batch.max_frames_per_microbatch or recipe.batch.batch_size * longest)
    capacity = None if options.device_gb is None else int(options.device_gb * 1e9)
    rows, recommendations = [], []
    for world_size in options.world_size:
        worst = find_worst(plan, size=recipe.global_batch_size(world_size), world_size=world_size, budget=budget)
        # A budget beyond what a rank has in a step is never used.
        slots = max(min(budget, worst.most), worst.floor)
        shares = {
            name: _static(size, backend, recipe, world_size, on_cuda=on_cuda)
            for name, backend in backends(world_size).items()
            # Where ranks compute on the host, there is no other place to move anything to.
            if on_cuda or not backend.offload_optimizer
        }
        for name, static in shares.items():
            taken = passes.bytes(slots, worst.padding, checkpointing=recipe.run.activation_checkpointing)
            rows.append(_row(name, world_size, static, taken, passes.reading * slots, capacity))
        recommendations.append(
            {"world_size": world_size, **_recommend(shares, passes, worst, slots, budget, capacity, recipe)}
        )
    chosen = passes.checkpointed if recipe.run.activation_checkpointing else passes.plain
    return {
        "source": lengths.source,
        "parameters": size.total,
        "largest_block": size.largest_block,
        "optimizer": recipe.optimization.optimizer,
        "mixed_precision": recipe.run.mixed_precision,
        "activation_checkpointing": recipe.run.activation_checkpointing,
        "budget": budget,
        "longest_clip": longest,
        "device": options.device,
        "device_bytes": capacity,
        "margin": _MARGIN,
        "measured": None if chosen is None else chosen.passes.to_json() | {"saved_per_slot": chosen.saved_per_slot},
        "shipped_configurations": sorted(path.name for path in _CONFIGURATIONS.glob("*.json")),
        "rows": rows,
        "recommendations": recommendations,
    }


def backends(world_size: int) -> dict[str, Backend]:
    """Return the backends that are worth asking about on so many ranks, by name, from the top of the ladder down."""
    from trainer.memory.static import Backend, zero_backend

    found = {"data parallel": Backend(kind="replicated")}
    for name, (file, fallback) in _ZERO.items():
        if world_size == 1 and "offload" not in name:
            # Nothing is shared on a single rank.
            continue
        path = _CONFIGURATIONS / f"{file}.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"zero_optimization": fallback}
        found[name] = zero_backend(config)
    if world_size > 1:
        found["FSDP2"] = Backend(kind="fsdp2")
    found["FSDP2, CPU offload"] = Backend(kind="fsdp2", offload_optimizer=True)
    return found


def _static(size: Any, backend: Backend, recipe: Recipe, world_size: int, *, on_cuda: bool) -> StaticMemory:
    from trainer.memory.static import static_memory

    return static_memory(
        size,
        backend=backend,
        world_size=world_size,
        optimizer=recipe.optimization.optimizer,
        on_cuda=on_cuda,
        fused=recipe.optimization.fused_optimizer,
    )


def _row(
    name: str, world_size: int, static: StaticMemory, activations: float | None, reading: float, capacity: int | None
) -> dict[str, Any]:
    total = None if activations is None else static.peak(activations) + reading
    return {
        "world_size": world_size,
        "backend": name,
        "parameters": static.parameters,
        "gradients": static.gradients,
        "optimizer": static.optimizer,
        "buffers_in_passes": static.in_passes,
        "buffers_in_update": static.in_update,
        "activations": activations,
        "read_ahead": reading,
        "sum": static.peak(0.0) + reading if total is None else total,
        "host": static.host,
        "fits": None if capacity is None or total is None else total <= capacity * (1.0 - _MARGIN),
    }


def _recommend(
    shares: dict[str, StaticMemory],
    passes: Passes,
    worst: WorstCells,
    slots: int,
    budget: int,
    capacity: int | None,
    recipe: Recipe,
) -> dict[str, Any]:
    """Come down the ladder to the first rung that fits; the order is that of a run that runs out of memory."""
    if capacity is None or passes.plain is None:
        return {"rung": None, "why": "give --device_gb and leave --measure on"}
    room = capacity * (1.0 - _MARGIN)
    checkpointing = recipe.run.activation_checkpointing

    def largest(name: str, *, checkpointed: bool) -> int:
        """Return the recipe's budget or the largest that fits; 0 if not even the longest clip alone does."""
        static = shares[name]
        counted = passes.checkpointed if checkpointed else passes.plain
        assert counted is not None
        left = room - static.kept - static.in_passes
        if left <= 0 or static.kept + static.in_update > room:
            return 0
        taken = dataclasses.replace(counted.passes, per_slot=counted.passes.per_slot + passes.reading)
        fitting = min(
            taken.largest_budget(int(left), margin=0.0, padding=worst.padding),
            int((room - static.kept - static.in_update) / passes.reading),
        )
        if fitting >= slots:
            return budget
        return fitting if fitting >= worst.floor else 0

    rungs: list[tuple[str, str, bool, int]] = [
        ("data parallel", "data parallel", checkpointing, budget),
        ("smaller budget", "data parallel", checkpointing, worst.floor),
        ("activation checkpointing", "data parallel", True, worst.floor),
    ]
    rungs += [(name, name, True, worst.floor) for name in ("ZeRO-2", "ZeRO-3") if name in shares]
    offloaded = ("ZeRO-2, CPU offload", "ZeRO-3, CPU offload")
    rungs += [("CPU offload", name, True, worst.floor) for name in offloaded if name in shares]
    for rung, name, checkpointed, needed in rungs:
        found = largest(name, checkpointed=checkpointed)
        if found >= needed:
            return {
                "rung": rung,
                "backend": name,
                "activation_checkpointing": checkpointed,
                "max_frames_per_microbatch": found,
            }
    return {"rung": None, "why": "nothing fits: cut long clips (--max_frames), lower --width, or take a larger device"}


def _format(report: dict[str, Any]) -> str:
    lines = [
        f"{report['parameters'] / 1e6:.1f} M parameters in float32 ({report['source']}), {report['optimizer']}, "
        f"{report['budget']} frames a micro-batch at most, the longest clip has {report['longest_clip']}",
        "",
    ]
    table = [_HEADINGS, *(_cells(row) for row in report["rows"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([*lines, "", *_notes(report)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    fits = {None: "-", True: "yes", False: "no"}[row["fits"]]
    return (
        f"{row['world_size']}",
        row["backend"],
        *(_mega(row[name]) for name in ("parameters", "gradients", "optimizer")),
        _mega(max(row["buffers_in_passes"], row["buffers_in_update"])),
        "-" if row["activations"] is None else _mega(row["activations"]),
        _mega(row["read_ahead"]),
        _mega(row["sum"]),
        _mega(row["host"]),
        fits,
    )


def _mega(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def _notes(report: dict[str, Any]) -> list[str]:
    """Say what was measured, what is estimated, and what to do."""
    code = "the CUDA context (some 500 MB)" if report["device"] == "cuda" else "the code of torch (some 400 MB)"
    notes = [
        "MB per rank. buffers: gathered weights and reductions, in passes or in the update, whichever is more. read\n"
        f"ahead: features of the cells to come. sum: the larger of the two moments, without {code}\n"
        "and fragmentation. host: what CPU offload keeps there, per rank."
    ]
    if any(row["backend"] == "ZeRO-2" for row in report["rows"]):
        notes.append(
            "ZeRO-2 keeps the local gradient whole until the step, so that passes can be made again: it saves what\n"
            "ZeRO-1 saves."
        )
    measured = report["measured"]
    if measured is None:
        notes.append("Activations were not measured (--no-measure): the sum leaves them out.")
    else:
        notes.append(
            f"Activations: {measured['per_slot'] / 1e3:.1f} kB a frame and {measured['fixed'] / 1e6:.0f} MB a pass, "
            "counted in passes of this model on this machine's\n"
            "CPU, tensor by tensor, so for any device; kernels' own workspaces are not in it. The rest is estimated "
            "from the size\nof the model and how each backend works."
        )
    if not report["shipped_configurations"]:
        notes.append("ZeRO with DeepSpeed's default buffers: there is no configuration in ds_configs/.")
    for chosen in report["recommendations"]:
        ranks = f"{chosen['world_size']} rank(s)"
        if chosen["rung"] is None:
            notes.append(f"{ranks}: {chosen['why']}")
            continue
        flags = f"--max_frames_per_microbatch {chosen['max_frames_per_microbatch']}"
        if chosen["activation_checkpointing"]:
            flags += " --activation_checkpointing true"
        notes.append(f"{ranks}: {chosen['rung']} ({chosen['backend']}, {flags})")
    return notes


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = OptionParser(
        prog="signscale estimate",
        description="What a recipe needs of memory under each backend and world size, and the first that fits.",
        epilog="Takes --config FILE and every flag of `signscale train` too: --data_dir, --width, --rnn_size, "
        "--batch_size, --max_frames_per_microbatch, --mixed_precision, --activation_checkpointing, …",
    )
    add = parser.add_argument
    add("--world_size", type=_world_sizes, default=[1], metavar="W,W,…", help="numbers of ranks, as in 1,2,8")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what the ranks compute on (default cuda); a CPU's kernels and gloo take other buffers than a GPU's",
    )
    add(
        "--device_gb",
        type=positive_number,
        metavar="G",
        help="memory of each device, in 10^9 bytes: then says what fits",
    )
    add("--lengths", type=Path, metavar="CSV", help="columns split,num_frames[,num_glosses], in place of a corpus")
    add("--feature_dim", type=positive_count, metavar="D", help="with --lengths: features per frame")
    add("--vocabulary", type=positive_count, metavar="V", help="with --lengths: glosses")
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count activations in passes of the real model on this machine's CPU; takes seconds (default on)",
    )
    add("--json", action="store_true", help="print JSON in place of the table")
    # Imported here: it takes half a second that no other command needs.
    from trainer.parsing import parse_recipe

    options, rest = parser.parse_beside_recipe(argv)
    recipe = parse_recipe(rest, parser.prog, check=False, needs_corpus=not options.lengths)
    problems = []
    if options.lengths:
        # Stands in for the corpus, which is then not asked for.
        corpus = dataclasses.replace(recipe.corpus, data_dir=recipe.corpus.data_dir or str(options.lengths))
        recipe = dataclasses.replace(recipe, corpus=corpus)
    elif options.feature_dim or options.vocabulary:
        problems.append("--feature_dim and --vocabulary: a corpus says these itself; give them with --lengths alone")
    problems += combination_problems(recipe)
    if problems:
        raise InputError(problems)
    return options, recipe


def _world_sizes(text: str) -> list[int]:
    return [positive_count(part) for part in text.split(",")]


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
