"""`signscale score`: the word error rate of files alone, without a model."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import InputError, exit_on_input_error, name_some
from trainer.scoring.ctm_stm import Transcripts, numbered_lines, read_transcripts
from trainer.scoring.protocols import PROTOCOLS, score
from trainer.scoring.wer import WerCounts

_ID_COLUMNS = ("id", "name")
_GLOSS_COLUMNS = ("annotation", "glosses", "gloss", "orth")


def main(argv: Sequence[str]) -> int:
    """Score a hypothesis file against a reference file; InputError for a user's mistake."""
    arguments = _parse(argv)
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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="signscale score",
        description="Word error rate of a hypothesis file, errors pooled over all clips of the references.",
        epilog="A clip without a line in the hypothesis file has an empty hypothesis.",
        allow_abbrev=False,
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
    return parser.parse_args(argv)


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
    """Read hypotheses from a CSV with an annotation file's header; here, no glosses mean an empty hypothesis.

    An annotation without glosses is an error, hence a reader apart.
    """
    lines = numbered_lines(path)
    number, header = next(lines, (1, ""))
    delimiter = next((mark for mark in "|\t," if mark in header), ",")

    def split(line: str) -> list[str]:
        # Only commas know quoting: PHOENIX writes quotation marks as they are.
        fields = next(csv.reader([line])) if delimiter == "," else line.split(delimiter)
        return [field.strip() for field in fields]

    names = [name.lower() for name in split(header)] if header else []
    id_columns = [names.index(name) for name in _ID_COLUMNS if name in names]
    gloss_columns = [names.index(name) for name in _GLOSS_COLUMNS if name in names]
    if not id_columns or len(gloss_columns) != 1:
        raise InputError(
            f"{path}:{number}: expected a header such as 'id,glosses' or 'id|folder|signer|annotation', with "
            f"one column of glosses; found {header.strip()!r}"
        )
    transcripts: Transcripts = {}
    problems = []
    for number, line in lines:
        fields = split(line)
        if len(fields) != len(names):
            problems.append(
                f"{path}:{number}: expected {len(names)} fields separated by {delimiter!r}, found "
                f"{len(fields)}: {line.strip()[:80]!r}"
            )
        elif fields[id_columns[0]] in transcripts:
            problems.append(f"{path}:{number}: duplicate id {fields[id_columns[0]]}: keep one hypothesis a clip")
        else:
            transcripts[fields[id_columns[0]]] = fields[gloss_columns[0]].split()
    if problems:
        more = len(problems) - 10
        raise InputError(problems[:10] + ([f"{path}: and {more} more problems"] if more > 0 else []))
    return transcripts


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
