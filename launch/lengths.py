"""Lengths of a corpus's training clips, for commands that plan and read no features; and what these commands ask."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError
from trainer.options import OptionParser, positive_count
from trainer.recipe import CorpusRecipe, Recipe, combination_problems

_TRAIN = "train"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What planning needs of the training clips, `[N]` each; the columns may be mapped from an index."""

    source: str
    num_frames: npt.NDArray[np.integer[Any]]
    min_outputs: npt.NDArray[np.integer[Any]]
    """Output frames that CTC needs at least."""
    keys: npt.NDArray[np.uint64]
    bytes: int | None
    """Stored size of all clips' features; None: not known."""
    feature_dim: int | None
    num_classes: int | None
    """Glosses of the training split and the blank; None: not known."""


def read_lengths(recipe: CorpusRecipe) -> Lengths:
    """Read the lengths of the training clips of any corpus the trainer opens, and no features."""
    from trainer.data.opening import OpenCorpus
    from trainer.data.table import FolderTable

    split = OpenCorpus(recipe, lambda text: print(text, file=sys.stderr)).split(_TRAIN)
    stored = int(split.num_frames.sum(dtype=np.int64)) * split.feature_dim * split.storage.dtype.itemsize
    if isinstance(split.table, FolderTable):
        # The files may be compressed, or of another type than what is made of them.
        stored = sum(clip.source.stat().st_size for clip in split.table.clips)
    return Lengths(
        source=recipe.data_dir,
        num_frames=split.num_frames,
        min_outputs=split.min_outputs,
        keys=split.keys,
        bytes=stored,
        feature_dim=split.feature_dim,
        num_classes=len(split.table.all_glosses()) + 1,
    )


def read_length_table(path: Path, feature_dim: int | None, vocabulary: int | None) -> Lengths:
    """Read lengths from a CSV with the columns split, num_frames and, if it has them, num_glosses, adjacent_repeats."""
    from trainer.randomness import mix

    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["split"] == _TRAIN:
                    outputs = int(row.get("num_glosses") or 1) + int(row.get("adjacent_repeats") or 0)
                    rows.append((int(row["num_frames"]), outputs))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend the path given with --lengths") from None
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: expected a CSV with the columns split, num_frames and perhaps num_glosses, found something else "
            f"({type(error).__name__}: {error}); mend the table given with --lengths"
        ) from None
    if not rows or min(map(min, rows)) < 1:
        found = f"{len(rows)} clips" if not rows else "a clip with fewer than one frame or gloss"
        raise InputError(f"{path}: expected clips of split {_TRAIN}, each with frames, found {found}; mend the table")
    table = np.array(rows)
    return Lengths(
        source=str(path),
        num_frames=table[:, 0],
        min_outputs=table[:, 1],
        keys=mix(np.arange(len(table), dtype=np.uint64)),
        bytes=4 * feature_dim * int(table[:, 0].sum()) if feature_dim else None,
        feature_dim=feature_dim,
        num_classes=vocabulary + 1 if vocabulary else None,
    )


def add_length_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a table of lengths stands in for a corpus."""
    add = parser.add_argument
    add("--lengths", type=Path, metavar="CSV", help="columns split,num_frames[,num_glosses], in place of a corpus")
    add("--feature_dim", type=positive_count, metavar="D", help="with --lengths: features per frame")
    add("--vocabulary", type=positive_count, metavar="V", help="with --lengths: glosses")


def parse_beside_lengths(parser: OptionParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    """Parse a command line that holds a recipe's flags and those of `add_length_options`; InputError for a mistake."""
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


def find_lengths(options: argparse.Namespace, recipe: Recipe) -> Lengths:
    """Read the lengths from the table that the options name, else from the recipe's corpus."""
    if options.lengths:
        return read_length_table(options.lengths, options.feature_dim, options.vocabulary)
    return read_lengths(recipe.corpus)


def world_sizes(text: str) -> list[int]:
    """Read numbers of ranks, `1,2,8`, for argparse's `type`."""
    return [positive_count(part) for part in text.split(",")]
