"""`signscale predict`: what is signed in a clip, when, and how sure the model is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser
from trainer.scoring.decoder import Decoder, add_decoder_options, check_decoder_options, open_decoder

# What needs torch is imported once the command line is known to be right.
if TYPE_CHECKING:
    from trainer.export.recognition import Recognition


def main(argv: Sequence[str]) -> int:
    """Check all files first, then print what is signed in each; InputError for a user's mistake."""
    options = _parse(argv)
    from trainer.export.formats import open_recognition

    recognition = open_recognition(options.checkpoint)
    _check_files(options.files, recognition)
    decoder = open_decoder(options, recognition.card.glosses, lambda text: print(text, file=sys.stderr))
    predictions = []
    for path in options.files:
        prediction = predict(path, recognition, decoder, fps=options.fps)
        predictions.append(prediction)
        if not options.json:
            print(_table(prediction), flush=True)
    if options.json:
        print(json.dumps({**decoder.as_dict(), "fps": options.fps, "clips": predictions}, indent=1, ensure_ascii=False))
    return 0


def predict(path: Path, recognition: Recognition, decoder: Decoder, *, fps: float) -> dict[str, Any]:
    """Recognise one feature file.

    Times are in seconds: a gloss lasts as long as the output frames of its alignment, no longer than the clip. Its
    confidence is the mean posterior over these frames. Raises `InputError` for a bad file.
    """
    from trainer.data.features import read_features
    from trainer.scoring.decoding import confidence

    features = read_features(path)
    log_probs = recognition.scores(features)
    try:
        emissions = decoder(log_probs)
    except ValueError as error:
        raise InputError(f"{path}: the model's {error}; use another checkpoint") from error
    seconds = recognition.card.total_stride / fps
    length = len(features) / fps
    glosses = recognition.vocabulary.decode(emission.label for emission in emissions)
    return {
        "file": str(path),
        "frames": len(features),
        "seconds": round(length, 3),
        "glosses": [
            {
                "gloss": gloss,
                "start": round(emission.start * seconds, 3),
                "end": round(min(length, (emission.start + emission.frames) * seconds), 3),
                "confidence": round(confidence(log_probs, emission), 4),
            }
            for gloss, emission in zip(glosses, emissions, strict=True)
        ],
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale predict",
        description="Print the glosses signed in clips of features, with start and end in seconds and a confidence: "
        "the mean posterior of the gloss over its frames.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.npz", help="features of a clip each, [T, D]")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN|EXPORT",
        help="run directory (its best checkpoint), checkpoint, or what `signscale export` wrote",
    )
    parser.add_argument("--fps", type=float, default=25.0, help="frames per second of the clips (default: 25)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    add_decoder_options(parser)
    options = parser.parse(argv)
    problems = check_decoder_options(options)
    if not 0 < options.fps < float("inf"):
        problems.append(f"--fps {options.fps}: expected a number above 0; 25 is usual")
    if problems:
        raise InputError(problems)
    return options


def _check_files(paths: Sequence[Path], recognition: Recognition) -> None:
    """Look at all files before the first is recognised; all that is wrong travels in one error."""
    from trainer.data.features import peek_shape

    problems: list[str] = []
    for path in paths:
        if path.is_dir() or path.suffix.lower() != ".npz":
            problems.append(f"{path}: expected features in an .npz file; extract them from the video first")
            continue
        try:
            num_frames, dim = peek_shape(path)
        except InputError as error:
            problems += error.problems
            continue
        if dim != (expected := recognition.card.feature_dim):
            problems.append(f"{path}: expected D = {expected} as in training, found {dim}; extract it anew")
        if num_frames < recognition.min_frames:
            problems.append(
                f"{path}: has {num_frames} frames, this export takes {recognition.min_frames} or more; use the run, or "
                "an export to another format"
            )
    if problems:
        raise InputError(problems)


def _table(prediction: dict[str, Any]) -> str:
    lines = [f"{prediction['file']}  ({prediction['seconds']:.2f} s)"]
    lines += [
        f"  {found['start']:7.2f} {found['end']:7.2f}  {found['confidence']:.2f}  {found['gloss']}"
        for found in prediction["glosses"]
    ]
    return "\n".join(lines if prediction["glosses"] else [*lines, "  no gloss"])


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
