"""`signscale estimate`: what a recipe needs of memory under each backend, before a GPU is asked for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.backends import CONFIGURATIONS, MARGIN, Passes, backends, recommend, share_of
from launch.estimate_table import format_report
from launch.lengths import Lengths, add_length_options, find_lengths, parse_beside_lengths, world_sizes
from launch.plan import make_plan
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.memory.static import StaticMemory
from trainer.options import OptionParser, positive_number
from trainer.recipe import VIDEO_MODELS, Recipe


def main(argv: Sequence[str]) -> int:
    """Print what a recipe needs under each backend; raises `InputError` for a user's mistake."""
    options, recipe = _parse(argv)
    report = make_report(options, recipe, find_lengths(options, recipe))
    print(json.dumps(report, indent=1, allow_nan=False) if options.json else format_report(report))
    return 0


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
    from trainer.memory.teacher import teacher_bytes
    from trainer.memory.worst import find_worst

    dim, classes = lengths.feature_dim, lengths.num_classes
    size = size_of(recipe, feature_dim=dim, num_classes=classes)
    teacher = teacher_bytes(recipe, feature_dim=dim, num_classes=classes)
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
            name: share_of(size, backend, recipe, world_size, teacher=teacher, on_cuda=on_cuda)
            for name, backend in backends(world_size).items()
            # Where ranks compute on the host, there is no other place to move anything to.
            if on_cuda or not backend.offload_optimizer
        }
        for name, static in shares.items():
            taken = passes.bytes(slots, worst.padding, checkpointing=recipe.run.activation_checkpointing)
            rows.append(_row(name, world_size, static, taken, passes.reading * slots, capacity))
        recommendations.append(
            {"world_size": world_size, **recommend(shares, passes, worst, slots, budget, capacity, recipe)}
        )
    chosen = passes.checkpointed if recipe.run.activation_checkpointing else passes.plain
    return {
        "source": lengths.source,
        "parameters": size.total,
        "auxiliary_parameters": size.auxiliary,
        "teacher_bytes": teacher,
        "largest_block": size.largest_block,
        "optimizer": recipe.optimization.optimizer,
        "mixed_precision": recipe.run.mixed_precision,
        "activation_checkpointing": recipe.run.activation_checkpointing,
        "budget": budget,
        "longest_clip": longest,
        "device": options.device,
        "device_bytes": capacity,
        "margin": MARGIN,
        "measured": None if chosen is None else chosen.passes.to_json() | {"saved_per_slot": chosen.saved_per_slot},
        "shipped_configurations": sorted(path.name for path in CONFIGURATIONS.glob("*.json")),
        "rows": rows,
        "recommendations": recommendations,
    }


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
        "teacher": static.teacher,
        "buffers_in_passes": static.in_passes,
        "buffers_in_update": static.in_update,
        "activations": activations,
        "read_ahead": reading,
        "sum": static.peak(0.0) + reading if total is None else total,
        "host": static.host,
        "fits": None if capacity is None or total is None else total <= capacity * (1.0 - MARGIN),
    }


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = OptionParser(
        prog="signscale estimate",
        description="What a recipe needs of memory under each backend and world size, and the first that fits.",
        epilog="Takes --config FILE and every flag of `signscale train` too: --data_dir, --width, --rnn_size, "
        "--batch_size, --max_frames_per_microbatch, --mixed_precision, --activation_checkpointing, …",
    )
    add = parser.add_argument
    add("--world_size", type=world_sizes, default=[1], metavar="W,W,…", help="numbers of ranks, as in 1,2,8")
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
    add_length_options(parser)
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count activations in passes of the real model on this machine's CPU; takes seconds (default on)",
    )
    add("--json", action="store_true", help="print JSON in place of the table")
    return parse_beside_lengths(parser, argv)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
