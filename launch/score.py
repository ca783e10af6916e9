"""`signscale score`: the word error rate of files alone, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import InputError, name_some
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser
from trainer.scoring.ctm_stm import Transcripts, read_transcripts
from trainer.scoring.protocols import PROTOCOLS, score
from trainer.scoring.wer import WerCounts


def main(argv: Sequence[str]) -> int:
    """Score a hypothesis file against a reference file; InputError for a user's mistake."""
    arguments = parse_options(argv)
    _refuse_swapped(arguments.reference, arguments.hypothesis)
    references = read_transcripts(arguments.reference, read_csv=_read_reference_csv)
    hypotheses = read_transcripts(arguments.hypothesis, read_csv=_read_hypothesis_csv)
    _refuse_unknown(references, hypotheses, arguments.reference, arguments.hypothesis)

    missing = [clip_id for clip_id in references if clip_id not in hypotheses]
    if missing:
        print(
            f"warning: {len(missing)} of {len(references)} references have no hypothesis in "
            f"{arguments.hypothesis}; all their words count as deletions: {name_some(missing)}",
            file=sys.stderr,
        )
    counts = score(
        list(references.values()), [hypotheses.get(clip_id, []) for clip_id in references], arguments.protocol
    )
    if arguments.json:
        summary = {"protocol": arguments.protocol, **counts.as_dict(), "missing_hypotheses": len(missing)}
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print(_table(counts, arguments.protocol))
    return 0


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale score",
        description="Word error rate of a hypothesis file, errors pooled over all clips of the references.",
        epilog="A clip without a line in the hypothesis file has an empty hypothesis.",
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="X.stm|csv", help="what was signed")
    parser.add_argument("--hypothesis", type=Path, required=True, metavar="Y.ctm|csv", help="what was recognised")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="plain",
        help="clean-up of the hypotheses before scoring: none, PHOENIX-2014's official one, or that one with "
        "adjacent repeats merged (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser.parse(argv)


def _refuse_swapped(reference: Path, hypothesis: Path) -> None:
    """Recognise swapped arguments by extension: the swapped WER would look like a result."""
    problems = []
    if reference.suffix.lower() == ".ctm":
        problems.append(f"--reference {reference}: expected .stm or .csv, found a .ctm; are the arguments swapped?")
    if hypothesis.suffix.lower() == ".stm":
        problems.append(f"--hypothesis {hypothesis}: expected .ctm or .csv, found an .stm; are the arguments swapped?")
    if problems:
        raise InputError(problems)


def _refuse_unknown(references: Transcripts, hypotheses: Transcripts, reference: Path, hypothesis: Path) -> None:
    unknown = [clip_id for clip_id in hypotheses if clip_id not in references]
    if unknown:
        raise InputError(
            f"{hypothesis}: {len(unknown)} of {len(hypotheses)} hypothesis ids are not in {reference}: "
            f"{name_some(unknown)}; take the references of the same split"
        )


def _read_reference_csv(path: Path) -> Transcripts:
    # Imported here: scoring knows nothing of the data room, and most calls need no CSV.
    from trainer.data.annotations import read_annotation_file

    return {annotation.id: list(annotation.glosses) for annotation in read_annotation_file(path)}


def _read_hypothesis_csv(path: Path) -> Transcripts:
    """Read hypotheses from a CSV; here, no glosses mean an empty hypothesis."""
    from trainer.data.annotations import read_annotation_file

    return {line.id: list(line.glosses) for line in read_annotation_file(path, allow_empty=True)}


def _table(counts: WerCounts, protocol: str) -> str:
    rows = [
        ("WER", f"{counts.wer:.2f} %  ({protocol})"),
        ("errors", f"{counts.errors}"),
        ("  substitutions", f"{counts.substitutions}"),
        ("  deletions", f"{counts.deletions}"),
        ("  insertions", f"{counts.insertions}"),
        ("reference words", f"{counts.reference_words}"),
        ("hypothesis words", f"{counts.hypothesis_words}"),
        ("clips", f"{counts.clips}"),
        ("empty hypotheses", f"{counts.empty_hypotheses}"),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
