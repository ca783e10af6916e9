"""`signscale export`: a trained model as one file, compared with the run before it is published."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.files import write_json
from trainer.options import OptionParser

# What needs torch is imported once the command line is known to be right.
if TYPE_CHECKING:
    from trainer.checkpoint.content import Checkpoint
    from trainer.data.table import Split


def main(argv: Sequence[str]) -> int:
    """Export, verify, publish; InputError for what cannot be exported, and nothing is written then."""
    options = parse_options(argv)
    from trainer.checkpoint.content import read_checkpoint
    from trainer.checkpoint.store import find_checkpoint, run_folder_of
    from trainer.export.formats import REPORT, check_format, open_recognition, write_model
    from trainer.export.recognition import Card, restore_model
    from trainer.export.verify import verify

    check_format(options.format)
    folder = find_checkpoint(options.checkpoint)
    # A checkpoint outside a run gets a folder beside it.
    output = options.output or run_folder_of(folder) / "export" / options.format
    _check_output(output)
    checkpoint = read_checkpoint(folder, with_optimizer=False)
    card = Card.of(checkpoint)
    model = restore_model(card, checkpoint.model, str(folder))
    clips = None if options.no_verify else _read_clips(options, checkpoint)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        _make(temporary)
        started = time.perf_counter()
        path = write_model(model, checkpoint, options.format, temporary)
        print(f"drawn and written in {time.perf_counter() - started:.0f} s; comparing with the run", flush=True)
        found = None
        if clips is not None:
            # From the file as it lies on the disk, through the same door that every user takes.
            found = verify(open_recognition(path), model, checkpoint, clips)
            found.check()
        report: dict[str, Any] = {
            "file": path.name,
            "format": options.format,
            "bytes": path.stat().st_size,
            "checkpoint": str(folder),
            "step": checkpoint.state.step,
            "glosses": len(card.glosses),
            "feature_dim": card.feature_dim,
            "frame_size": card.frame_size,
            "crop_size": card.crop_size,
            "total_stride": card.total_stride,
            "normalization": card.normalization,
            "verification": found and dataclasses.asdict(found),
        }
        write_json(temporary / REPORT, report)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{output / path.name}: {report['bytes'] / 1e6:.1f} MB, checkpoint of step {report['step']}")
    if found is None:
        print("not compared with the run (--no_verify)")
    else:
        print(
            f"{found.same_hypotheses} of {found.clips} {found.split} clips have the run's hypotheses; "
            f"log-probabilities differ by at most {found.largest_difference:.1e}"
        )
    return 0


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale export",
        description="Export a trained model as one file with its vocabulary and normalisation inside: raw features "
        "[T, D] of one clip in, or its frames, uint8 [T, H, W, 3]; log-probabilities out.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run directory (its best checkpoint), or checkpoint"
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=("safetensors", "torch_export", "onnx"),
        help="weights alone, for this package; a graph for PyTorch; a graph for ONNX (pip install 'signscale[onnx]')",
    )
    parser.add_argument("--output", type=Path, help="folder to make (default: RUN/export/FORMAT)")
    parser.add_argument("--split", default="dev", help="split to compare with the run on (default: dev)")
    parser.add_argument("--data_dir", help="corpus folder (default: the run's)")
    parser.add_argument("--annotations", help="annotations (default: the run's, or in DATA_DIR)")
    parser.add_argument("--no_verify", action="store_true", help="export without a corpus to compare on")
    return parser.parse(argv)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; name another --output, or remove it first")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{folder.parent}: cannot be written to ({error.strerror}); choose another --output"
        ) from error


def _read_clips(options: argparse.Namespace, checkpoint: Checkpoint) -> Split:
    from trainer.data.opening import OpenCorpus
    from trainer.recipe import VIDEO_MODELS

    corpus = checkpoint.recipe.corpus
    if options.data_dir:
        corpus = dataclasses.replace(corpus, data_dir=options.data_dir, annotations=options.annotations or "")
    elif options.annotations:
        corpus = dataclasses.replace(corpus, annotations=options.annotations)
    is_video = checkpoint.recipe.model.model in VIDEO_MODELS
    try:
        return OpenCorpus(corpus, print, video=is_video).split(
            options.split, expected_dim=checkpoint.normalization.feature_dim
        )
    except InputError as error:
        hint = "the corpus serves to compare the export with the run: mend --data_dir, or go without it by --no_verify"
        raise InputError([*error.problems, hint]) from None


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
