"""`signscale describe`: what a model costs, of a run or of a recipe: parameters, operations, time on a CPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.options import FPS, OptionParser, positive_count, positive_number
from trainer.recipe import VIDEO_MODELS, Recipe, combination_problems

# What needs torch is imported once the command line is known to be right.
if TYPE_CHECKING:
    from trainer.models.figures import Figures, Subject

SECONDS = 4.0
"""Length of the clip that models are measured on; PHOENIX-2014's clips last 5.6 seconds on average."""


def main(argv: Sequence[str]) -> int:
    """Print what a model costs; raises `InputError` for a user's mistake."""
    options, recipe = _parse(argv)
    model = read_model(options.checkpoint) if options.checkpoint else make_model(recipe, options)
    from trainer.models.figures import measure

    [figures] = measure([model.subject], seconds=options.seconds, fps=options.fps, timed=options.measure)
    report = make_report(model, figures, seconds=options.seconds, fps=options.fps)
    print(json.dumps(report, indent=1, allow_nan=False) if options.json else _format(report))
    return 0


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model and where it comes from."""

    source: str
    """Checkpoint, corpus, or what the sizes were given by."""
    recipe: Recipe
    """What it was built by."""
    vocabulary: int
    """Glosses, the blank not counted."""
    step: int | None
    """Optimizer steps of its checkpoint; None: fresh weights."""
    subject: Subject
    """The model itself."""


def read_model(path: Path) -> Described:
    """Load a run's best checkpoint, or the checkpoint that is named; raises `InputError` if it is none, or damaged."""
    from trainer.checkpoint.content import read_checkpoint
    from trainer.checkpoint.store import find_checkpoint
    from trainer.models.build import load_weights

    folder = find_checkpoint(path)
    checkpoint = read_checkpoint(folder, with_optimizer=False)
    subject = _build(checkpoint.recipe, checkpoint.normalization.feature_dim, len(checkpoint.vocabulary))
    load_weights(subject.model, checkpoint.model, where=str(folder))
    return Described(
        source=str(folder),
        recipe=checkpoint.recipe,
        vocabulary=len(checkpoint.vocabulary) - 1,
        step=checkpoint.state.step,
        subject=subject,
    )


def make_model(recipe: Recipe, options: argparse.Namespace) -> Described:
    """Build a recipe's model anew, as large as its corpus or the command line says."""
    if recipe.corpus.data_dir:
        from launch.lengths import read_lengths

        lengths = read_lengths(recipe.corpus)
        assert lengths.feature_dim is not None
        assert lengths.num_classes is not None
        source, dim, classes = lengths.source, lengths.feature_dim, lengths.num_classes
    else:
        source = "sizes as given"
        # Frames of video have no D.
        dim, classes = options.feature_dim or 0, options.vocabulary + 1
    return Described(
        source=source, recipe=recipe, vocabulary=classes - 1, step=None, subject=_build(recipe, dim, classes)
    )


def _build(recipe: Recipe, feature_dim: int, num_classes: int) -> Subject:
    from trainer.models.build import build_model
    from trainer.models.figures import Subject

    return Subject(
        model=build_model(recipe.model, feature_dim=feature_dim, num_classes=num_classes),
        frame_size=recipe.corpus.frame_crop,
    )


def make_report(model: Described, figures: Figures, *, seconds: float, fps: float) -> dict[str, Any]:
    """Put together what is printed."""
    return {
        "model": model.recipe.model.model,
        "source": model.source,
        "step": model.step,
        "parameters": figures.parameters,
        "weight_bytes": 4 * figures.parameters,
        "flops_per_second": figures.flops_per_second,
        "real_time_factor": figures.real_time_factor,
        "passes": list(figures.passes),
        "clip_seconds": seconds,
        "fps": fps,
        "frame_shape": list(model.subject.frame_shape),
        "total_stride": model.subject.model.total_stride,
        "vocabulary": model.vocabulary,
    }


def _format(report: dict[str, Any]) -> str:
    shape, stride, fps = report["frame_shape"], report["total_stride"], report["fps"]
    frame = f"D = {shape[0]}" if len(shape) == 1 else " x ".join(map(str, shape))
    weights = "fresh weights" if report["step"] is None else f"step {report['step']}"
    rows = [
        ("model", f"{report['model']} ({report['source']}, {weights})"),
        ("parameters", f"{report['parameters']:,} ({report['weight_bytes'] / 1e6:.1f} MB in float32)"),
        ("operations", f"{report['flops_per_second'] / 1e9:.3f} GFLOP per second of video"),
        ("real-time factor", _speed(report)),
        ("input", f"{frame} a frame, {fps:g} frames per second"),
        ("total stride", f"{stride} ({fps / stride:.3g} output frames per second)"),
        ("vocabulary", f"{report['vocabulary']} glosses"),
    ]
    return "\n".join([*(f"{name:<18}{text}" for name, text in rows), "", _notes(report)])


def _speed(report: dict[str, Any]) -> str:
    passes = report["passes"]
    if not passes:
        return "not measured"
    return (
        f"{report['real_time_factor']:.4f} (median of {len(passes)} passes, {min(passes):.4f} to {max(passes):.4f}; "
        f"{1 / report['real_time_factor']:.0f} x real time)"
    )


def _notes(report: dict[str, Any]) -> str:
    notes = "A multiply-add is two operations; those of matrix products and convolutions are counted."
    if report["passes"]:
        notes += (
            "\nReal-time factor: seconds of computing per second of video, from frames to logits, on one thread of\n"
            f"this machine's CPU in float32, on a clip of {report['clip_seconds']:g} s; without reading and decoding."
        )
    return notes


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = OptionParser(
        prog="signscale describe",
        description="What a model costs: parameters, operations per second of video, and time on one CPU thread.",
        epilog="In place of --checkpoint it takes --config FILE and every flag of `signscale train`: --model, --width, "
        "--rnn_size, --streams, …; its corpus (--data_dir), or --feature_dim and --vocabulary, say the sizes.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="RUN", help="run directory (its best checkpoint), or checkpoint")
    add("--feature_dim", type=positive_count, metavar="D", help="without a corpus: features per frame")
    add("--vocabulary", type=positive_count, metavar="V", help="without a corpus: glosses")
    add_measuring_options(parser)
    add("--json", action="store_true", help="print JSON in place of the table")
    # Imported here: it takes half a second that no other command needs.
    from trainer.parsing import parse_recipe

    options, rest = parser.parse_beside_recipe(argv)
    # A checkpoint or the sizes stand in for the corpus, which is then not asked for.
    recipe = parse_recipe(rest, parser.prog, check=False, needs_corpus=False)
    problems = _source_problems(options, rest, recipe)
    problems += combination_problems(recipe, needs_corpus=False)
    if problems:
        raise InputError(problems)
    return options, recipe


def _source_problems(options: argparse.Namespace, rest: Sequence[str], recipe: Recipe) -> list[str]:
    """Say what leaves the model or its size open, or names it twice."""
    sizes = [name for name in ("feature_dim", "vocabulary") if getattr(options, name) is not None]
    given = [*(f"--{name}" for name in sizes), *(word.split("=")[0] for word in rest if word.startswith("--"))]
    if options.checkpoint:
        return [f"{' and '.join(given)}: a checkpoint says these itself; drop them, or --checkpoint"] if given else []
    if recipe.corpus.data_dir:
        return [f"--{name}: the corpus says it itself; give it without --data_dir" for name in sizes]
    needed = {"vocabulary"} if recipe.model.model in VIDEO_MODELS else {"feature_dim", "vocabulary"}
    missing = sorted(needed - set(sizes))
    if not missing:
        return []
    flags = " and ".join(f"--{name}" for name in missing)
    return [f"{flags}: not given; give them, or name a corpus (--data_dir DIR) or a run (--checkpoint RUN)"]


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what clip models are measured on."""
    add = parser.add_argument
    add("--fps", type=positive_number, default=FPS, help=f"frames per second of the video (default: {FPS:g})")
    add(
        "--seconds",
        type=positive_number,
        default=SECONDS,
        help=f"length of the clip to measure on (default: {SECONDS:g})",
    )
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time passes on this machine's CPU; takes seconds (default on)",
    )


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
