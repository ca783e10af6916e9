"""`signscale synth`: write a synthetic corpus."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.data.synthetic import EVALUATION_SHARE, SplitSummary, SyntheticSpec, write_corpus
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser

_FRAME_SIZE = 64


def _build_parser() -> OptionParser:
    parser = OptionParser(
        prog="signscale synth",
        description="Write a synthetic corpus: OUT/{train,dev,test}/<id>.npz and OUT/annotations, or small videos of "
        "the same signing in PHOENIX-2014's layout. The same flags give the same bytes; more --clips at the same "
        "--vocabulary continue the smaller corpus.",
    )
    add = parser.add_argument
    add(
        "--layout",
        choices=["features", "phoenix2014"],
        default="features",
        help="what a clip is: features per frame, or PNG frames (default features)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="directory to create (or an empty one)")
    add(
        "--clips",
        type=int,
        required=True,
        metavar="N",
        help=f"training clips; dev and test get 1/{1 / EVALUATION_SHARE:g} of that each, at least 4",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of language, signers and clips (default 0)")
    add(
        "--size",
        choices=["demo", "full"],
        default="demo",
        help="demo: 3-6 glosses in 20-60 frames; full: the lengths of PHOENIX-2014 at 25 frames per second, "
        "about 4 MB a clip (default demo)",
    )
    add(
        "--vocabulary",
        type=int,
        default=0,
        metavar="V",
        help="glosses (default 16 or 1295 by size; fewer where --clips cannot show each three times)",
    )
    add("--feature_dim", type=int, default=0, metavar="D", help="features per frame (default 96 or 6516)")
    add("--frame_size", type=int, default=0, metavar="P", help="pixels a side of phoenix2014's frames (default 64)")
    add("--signers", type=int, default=0, help="signers, a quarter of them not in train (default 10 or 9)")
    return parser


def _tabulate(summaries: list[SplitSummary]) -> str:
    rows = [("split", "clips", "frames", "glosses", "MB")]
    rows += [(s.split, f"{s.clips}", f"{s.frames}", f"{s.glosses}", f"{s.bytes / 1e6:.1f}") for s in summaries]
    return "\n".join(f"{row[0]:<6}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises `InputError` for flags that do not go together."""
    options = _build_parser().parse(argv)
    if options.layout == "phoenix2014" and options.feature_dim:
        raise InputError("--feature_dim: is for --layout features; drop it, or give --frame_size")
    if options.layout != "phoenix2014" and options.frame_size:
        raise InputError("--frame_size: is for --layout phoenix2014; drop it, or add that")
    return options


def main(argv: Sequence[str]) -> int:
    """Write the corpus the flags ask for and print what it holds. Raises `InputError` on a bad value."""
    options = parse_options(argv)
    is_video = options.layout == "phoenix2014"
    spec = SyntheticSpec(
        clips=options.clips,
        seed=options.seed,
        size=options.size,
        vocabulary_size=options.vocabulary,
        feature_dim=options.feature_dim,
        signers=options.signers,
        frame_size=(options.frame_size or _FRAME_SIZE) if is_video else 0,
    )
    summaries = write_corpus(spec, options.out)
    print(_tabulate(summaries))
    content = f"frames of {spec.frame_size}x{spec.frame_size}" if is_video else f"D = {spec.feature_dim}"
    print(
        f"{options.out}: vocabulary {spec.vocabulary_size}, {content}, {spec.signers} signers "
        f"({spec.held_out_signers} of them in dev and test only)"
    )
    return 0


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
