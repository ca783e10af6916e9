"""Which decoder a command uses: its options, checked, and what a report says of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.scoring.beam import BeamSearch, Floats, Fusion
from trainer.scoring.decoding import Emission, best_path
from trainer.scoring.lm import read_arpa

DEFAULT_WIDTH = 10
DEFAULT_LM_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder of one clip's log-probabilities `[T, V]`, and its description."""

    beam: BeamSearch | None = None
    """The beam search; None for the best path."""
    lm: Path | None = None
    """File of the language model, if there is one."""

    def __call__(self, log_probs: Floats) -> list[Emission]:
        """Decode one clip; raises ValueError where the beam meets NaN."""
        return list(best_path(np.asarray(log_probs).argmax(axis=1))) if self.beam is None else self.beam(log_probs)

    def as_dict(self) -> dict[str, Any]:
        """Describe the decoder for a report."""
        if self.beam is None:
            return {"decoder": "best path", "beam_width": 1}
        description: dict[str, Any] = {"decoder": "prefix beam search", "beam_width": self.beam.width}
        if (fusion := self.beam.fusion) is not None:
            description |= {
                "lm": str(self.lm),
                "lm_order": fusion.model.order,
                "lm_weight": fusion.weight,
                "lm_insertion": fusion.insertion,
            }
        return description

    def __str__(self) -> str:
        if self.beam is None:
            return "best path (greedy)"
        text = f"prefix beam search, width {self.beam.width}"
        if (fusion := self.beam.fusion) is not None:
            text += f", {fusion.model.order}-gram {self.lm}, weight {fusion.weight:g}, insertion {fusion.insertion:g}"
        return text


def add_decoder_options(parser: argparse.ArgumentParser) -> None:
    """Declare what `check_decoder_options` and `open_decoder` read."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--beam_width",
        type=int,
        default=DEFAULT_WIDTH,
        help="gloss sequences the prefix beam search keeps; 1 takes the best path (default: %(default)s)",
    )
    group.add_argument("--lm", type=Path, metavar="FILE.arpa", help="n-gram language model over glosses, an ARPA file")
    group.add_argument("--lm_weight", type=float, help=f"weight of ln P(glosses) (default: {DEFAULT_LM_WEIGHT})")
    group.add_argument("--lm_insertion", type=float, help="reward of each gloss beside it, in nats (default: 0)")


def check_decoder_options(options: argparse.Namespace) -> list[str]:
    """List what is wrong with the options; nothing is read."""
    problems = []
    if options.beam_width < 1:
        problems.append(f"--beam_width {options.beam_width}: expected 1 (best path) or more; 10 is usual")
    if options.lm is not None and options.beam_width == 1:
        problems.append(
            "--lm: the best path (--beam_width 1) cannot use a language model; set --beam_width 10, or drop it"
        )
    for name, is_right, expected in (
        ("lm_weight", lambda value: 0 < value < math.inf, "a number above 0"),
        ("lm_insertion", math.isfinite, "a finite number"),
    ):
        value = getattr(options, name)
        if value is None:
            continue
        if options.lm is None:
            problems.append(f"--{name} belongs to a language model; add --lm FILE.arpa, or drop it")
        if not is_right(value):
            problems.append(f"--{name} {value}: expected {expected}")
    return problems


def open_decoder(
    options: argparse.Namespace, glosses: Sequence[str], log: Callable[[str], None] = lambda text: None
) -> Decoder:
    """Make the decoder that the options ask for; raises `InputError` for a bad language model.

    `glosses[i]` is class i + 1. `log` hears how many of them the language model does not know.
    """
    if options.beam_width == 1:
        return Decoder()
    if options.lm is None:
        return Decoder(beam=BeamSearch(width=options.beam_width))
    model = read_arpa(options.lm, glosses)
    if model.unknown:
        log(f"{options.lm}: {len(model.unknown)} of {len(glosses)} glosses are unknown to the language model")
    weight = DEFAULT_LM_WEIGHT if options.lm_weight is None else options.lm_weight
    fusion = Fusion(model=model, weight=weight, insertion=options.lm_insertion or 0.0)
    return Decoder(beam=BeamSearch(width=options.beam_width, fusion=fusion), lm=options.lm)
