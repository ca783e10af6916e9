"""Lengths of a corpus's training clips, for commands that plan and read no features."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError
from trainer.recipe import CorpusRecipe

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
