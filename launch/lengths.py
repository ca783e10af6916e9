"""Lengths of a corpus's training clips, for commands that plan and read no features."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError, name_some
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
    """Read the lengths of the training clips of a folder of npz files or of a packed corpus, and no features."""
    if "://" in recipe.data_dir or (Path(recipe.data_dir) / "manifest.json").is_file():
        return _read_packed(recipe)
    from trainer.data.corpus import feature_dim, min_output_frames, read_split
    from trainer.data.opening import annotations_of
    from trainer.randomness import clip_keys

    clips = read_split(
        Path(recipe.data_dir),
        annotations_of(recipe),
        _TRAIN,
        allow_missing=recipe.allow_missing,
        log=lambda text: print(text, file=sys.stderr),
    )
    return Lengths(
        source=recipe.data_dir,
        num_frames=np.array([clip.num_frames for clip in clips]),
        min_outputs=np.array([min_output_frames(clip.glosses) for clip in clips]),
        keys=clip_keys([clip.id for clip in clips]),
        bytes=sum(clip.source.stat().st_size for clip in clips),
        feature_dim=feature_dim(clips),
        num_classes=len({gloss for clip in clips for gloss in clip.glosses}) + 1,
    )


def _read_packed(recipe: CorpusRecipe) -> Lengths:
    """Map the index of a packed corpus: no Python object is made per clip, of which there may be millions."""
    from trainer.data.shards.format import INDEX_COLUMNS, MANIFEST, Manifest, map_columns, record_bytes
    from trainer.data.shards.store import open_store

    where = recipe.data_dir
    store = open_store(where)
    manifest = Manifest.parse(store.local_path(MANIFEST).read_bytes(), f"{where}/{MANIFEST}")
    if _TRAIN not in manifest.splits:
        splits = name_some(sorted(manifest.splits))
        raise InputError(f"{where}: expected a split {_TRAIN}, found {splits}; pack the corpus anew with it")
    wanted = {name: INDEX_COLUMNS[name] for name in ("num_frames", "min_outputs", "key")}
    entry = manifest.splits[_TRAIN]
    columns = map_columns(store.local_path(entry.index.name), wanted)
    vocabulary = json.loads(store.local_path(manifest.vocabulary.name).read_bytes())
    return Lengths(
        source=where,
        num_frames=columns["num_frames"],
        min_outputs=columns["min_outputs"],
        keys=columns["key"],
        bytes=int(record_bytes(np.array([entry.frames]), manifest.feature_dim, manifest.dtype)[0]),
        feature_dim=manifest.feature_dim,
        num_classes=int(np.count_nonzero(vocabulary["counts"][_TRAIN])) + 1,
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
