"""`signscale plan`: what steps a recipe makes of a corpus at any world size, without ranks and without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.lengths import Lengths, add_length_options, find_lengths, parse_beside_lengths, world_sizes
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser, positive_count, positive_number
from trainer.recipe import Recipe

# What needs torch is imported once the command line is known to be right.
if TYPE_CHECKING:
    from trainer.data.plan import Plan

_BYTES_PER_PARAMETER = 4
_HEADINGS = (
    *("ranks", "batch", "steps", "cells", "padding", "imbalance", "over ideal"),
    *("idle", "read", "step", "efficiency", "all-reduce", "window"),
)


def main(argv: Sequence[str]) -> int:
    """Print the plan of a recipe at each world size; raises `InputError` for a user's mistake."""
    options, recipe = _parse(argv)
    report = make_report(options, recipe, find_lengths(options, recipe))
    print(json.dumps(report, indent=1, allow_nan=False) if options.json else _format(report))
    return 0


def make_plan(recipe: Recipe, lengths: Lengths) -> Plan:
    """Build the plan of a run, clips that CTC cannot learn left out as in training."""
    from trainer.data.augment import augmentation_of
    from trainer.data.plan import Plan

    c, stride = recipe.corpus, recipe.model.total_stride
    chosen: Any = slice(None)
    feasible = -(-lengths.num_frames // stride) >= lengths.min_outputs
    if not feasible.all() or c.overfit_clips:
        chosen = np.flatnonzero(feasible)[: c.overfit_clips or None]
        if not len(chosen):
            raise InputError(
                f"{lengths.source}: no training clip has the output frames CTC needs at total_stride {stride}; lower "
                "total_stride, or check that glosses and frames belong together"
            )
    return Plan(
        num_frames=lengths.num_frames[chosen],
        min_outputs=lengths.min_outputs[chosen],
        keys=lengths.keys[chosen],
        total_stride=stride,
        seed=recipe.run.seed,
        augmentation=augmentation_of(c),
        mixup_alpha=recipe.objective.mixup_alpha,
        shuffle_window=recipe.batch.shuffle_window,
    )


def make_report(options: argparse.Namespace, recipe: Recipe, lengths: Lengths) -> dict[str, Any]:
    """Work out what is printed: the corpus, the recipe's figures, and a row per world size."""
    from trainer.data.cost import FRAMES_ONLY, read_cost_model
    from trainer.data.forecast import choose_window, forecast
    from trainer.layout import slot_frames

    # Refused before the work is done, should anything be missing.
    model = read_cost_model(Path(recipe.batch.cost_model)) if recipe.batch.cost_model else FRAMES_ONLY
    parameters = count_parameters(recipe, lengths) if options.fabric_gbit else None
    plan = make_plan(recipe, lengths)
    longest = int(slot_frames(np.array([plan.num_frames.max()]), plan.total_stride)[0])
    budget = recipe.batch.max_frames_per_microbatch or recipe.batch.batch_size * longest
    share = plan.num_clips / len(lengths.num_frames)

    def size(world_size: int) -> int:
        if options.clips_per_rank:
            return int(options.clips_per_rank) * world_size
        return recipe.global_batch_size(world_size)

    alone = forecast(plan, size=size(1), world_size=1, budget=budget, model=model)
    rows = []
    for world_size in options.world_size:
        asked: dict[str, Any] = {"size": size(world_size), "world_size": world_size, "budget": budget, "model": model}
        outcome = forecast(plan, **asked, epochs=options.epochs_measured)
        row = dataclasses.asdict(outcome) | {"time_over_ideal": outcome.time_over_ideal}
        compute = row.pop("seconds")
        del row["ideal_seconds"]
        reduce = None
        if parameters is not None:
            # A ring sends and receives every gradient almost twice.
            sent = 2 * (world_size - 1) / world_size * parameters * _BYTES_PER_PARAMETER
            reduce = sent / (options.fabric_gbit * 1e9 / 8)
        fitted = model is not FRAMES_ONLY
        whole = compute + (reduce or 0.0) * fitted
        row["step_seconds"] = whole if fitted else None
        row["scaling_efficiency"] = outcome.frames / whole / world_size / (alone.frames / alone.seconds)
        row["all_reduce_seconds"] = reduce
        row["all_reduce_share"] = reduce / whole if fitted and reduce is not None else None
        read = None if lengths.bytes is None else lengths.bytes * share * (1.0 + outcome.mixed)
        row["bytes_per_rank_and_epoch"] = None if read is None else round(read / world_size)
        row["recommended_shuffle_window"] = choose_window(plan, **asked)
        rows.append(row)
    return {
        "source": lengths.source,
        "clips": plan.num_clips,
        "infeasible_clips": 0 if recipe.corpus.overfit_clips else len(lengths.num_frames) - plan.num_clips,
        "frames_mean": float(plan.num_frames.mean()),
        "frames_longest": int(plan.num_frames.max()),
        "total_stride": plan.total_stride,
        "shuffle_window": plan.shuffle_window,
        "frames_per_cell_at_most": budget,
        "parameters": parameters,
        "cost_model": model.to_json() if model is not FRAMES_ONLY else None,
        "world_sizes": rows,
    }


def count_parameters(recipe: Recipe, lengths: Lengths) -> int:
    """Count the parameters of the recipe's model without making them."""
    if lengths.feature_dim is None or lengths.num_classes is None:
        raise InputError(
            f"{lengths.source}: the all-reduce of --fabric_gbit needs the size of the model; give --feature_dim D and "
            "--vocabulary V, which a table of lengths does not say"
        )
    from trainer.memory.activations import size_of

    return size_of(recipe, feature_dim=lengths.feature_dim, num_classes=lengths.num_classes).total


def _format(report: dict[str, Any]) -> str:
    table = [_HEADINGS, *(_cells(row) for row in report["world_sizes"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        f"{report['clips']} training clips ({report['source']}), {report['frames_mean']:.1f} frames on average, "
        f"{report['frames_longest']} at most; total_stride {report['total_stride']}, shuffle_window "
        f"{report['shuffle_window']}, at most {report['frames_per_cell_at_most']} frames a cell",
    ]
    if report["infeasible_clips"]:
        lines.append(f"{report['infeasible_clips']} more have fewer output frames than CTC needs and are left out")
    lines += [
        "",
        *("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table),
        "",
    ]
    return "\n".join([*lines, *_notes(report)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    step, share, reduce = row["step_seconds"], row["all_reduce_share"], row["all_reduce_seconds"]
    read = row["bytes_per_rank_and_epoch"]
    return (
        f"{row['world_size']}",
        f"{row['batch_clips']}",
        f"{row['steps_per_epoch']}",
        f"{row['cells_per_rank']:.3g}",
        f"{100 * row['padding']:.1f} %",
        f"{row['imbalance']:.3f}",
        f"{row['step_over_ideal']:.3f}",
        f"{row['idle_ranks']:.3g}" if row["idle_ranks"] < 1 else f"{row['idle_ranks']:.0f}",
        "-" if read is None else _size(read),
        "-" if step is None else f"{step:.3f} s",
        f"{100 * row['scaling_efficiency']:.1f} %",
        f"{100 * share:.1f} %" if share is not None else "-" if reduce is None else f"{1e3 * reduce:.3g} ms",
        f"{row['recommended_shuffle_window'] or '-'}",
    )


def _size(count: float) -> str:
    power = min(4, max(0, int(np.log10(max(count, 1)) / 3)))
    return f"{count / 1000.0**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _notes(report: dict[str, Any]) -> list[str]:
    """Say how the figures are to be read, and what is wrong at a world size."""
    model, rows = report["cost_model"], report["world_sizes"]
    notes = [
        "batch: clips of a step. over ideal: slots of the fullest rank over the mean of real frames. read: per rank\n"
        "and epoch. efficiency: frames per second and rank, over those of one rank. window: the smallest\n"
        "shuffle_window within 5 % of the ideal step (-: none)."
    ]
    if model is None:
        notes.append("In frames only, without times: give --cost_model, a cost_model.json or a run that holds one.")
    else:
        notes.append(
            f"Times by a cost model of {model['samples']} steps ({100 * model['residual']:.1f} % off on average): "
            f"{model['per_slot']:.3g} s a frame, {model['per_walk']:.3g} s an output frame of the longest clip, "
            f"{model['per_cell']:.3g} s a cell; ranks balanced by it, as with --cost_model in training."
        )
    if report["parameters"] is not None:
        notes.append(
            f"All-reduce: a ring over the gradients of {report['parameters'] / 1e6:.1f} M parameters in float32, "
            "counted as if nothing of it were hidden behind the backward pass."
        )
    for row in rows:
        ranks, batch = row["world_size"], row["batch_clips"]
        if row["idle_ranks"] >= 1:
            notes.append(
                f"{ranks} ranks: {row['idle_ranks']:.0f} of them idle, a step has {batch} clips; use fewer ranks, or "
                "let the batch grow (--batch_scaling linear, or a larger --batch_size)"
            )
        if ranks > report["clips"]:
            notes.append(f"{ranks} ranks: more than the {report['clips']} training clips; training refuses to start")
        if row["steps_per_epoch"] < 10:
            notes.append(f"{ranks} ranks: an epoch is {row['steps_per_epoch']} step(s); the corpus limits the scale")
    measured = ", ".join(f"{row['steps_measured']}" for row in rows)
    return [*notes, f"Full steps measured: {measured}."]


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = OptionParser(
        prog="signscale plan",
        description="What steps a recipe makes of a corpus at any world size, from the lengths of its clips alone.",
        epilog="Takes --config FILE and every flag of `signscale train` too: --data_dir, --batch_size, "
        "--gradient_accumulation_steps, --batch_scaling, --total_stride, --shuffle_window, "
        "--max_frames_per_microbatch, --augment, …; with --cost_model PATH (cost_model.json, or a run that holds one) "
        "times are predicted too.",
    )
    add = parser.add_argument
    add("--world_size", type=world_sizes, required=True, metavar="W,W,…", help="numbers of ranks, as in 8,64,512")
    add("--clips_per_rank", type=positive_count, metavar="N", help="global batch of N clips times the world size")
    add("--epochs_measured", type=positive_count, default=1, metavar="E", help="epochs the means run over (default 1)")
    add("--fabric_gbit", type=positive_number, metavar="G", help="bandwidth of each rank for the all-reduce, in Gbit/s")
    add_length_options(parser)
    add("--json", action="store_true", help="print JSON in place of the table")
    return parse_beside_lengths(parser, argv)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
