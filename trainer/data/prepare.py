"""From a recipe to a checked corpus: every clip read once, in shares, before any training time is spent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.data.corpus import Clip, feature_dim, min_output_frames, read_split
from trainer.data.features import ClipScan, Moments, scan_clip
from trainer.data.normalization import Normalization, from_moments
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError, name_some
from trainer.recipe import CorpusRecipe

Log = Callable[[str], None]

# Moments are merged chunk by chunk in a fixed order: the result is the same to the bit on any number of ranks.
_CHUNK = 64


class Ranks(Protocol):
    """What reading in shares needs of the engine."""

    rank: int
    world_size: int

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in their order, on every rank."""

    def together(self, act: Callable[[], Any]) -> Any:
        """Run `act` on every rank; raise the `InputError` of any of them on all."""


@dataclass(frozen=True, kw_only=True)
class TrainingCorpus:
    """The clips a run trains on and is validated on, with what was computed from them."""

    train: list[Clip]
    dev: list[Clip]
    infeasible: list[str]
    vocabulary: Vocabulary
    normalization: Normalization
    clips_hash: str
    """Hash of the training clips in their order, with frames and glosses: what the plan is made from."""
    files_hash: str
    """Hash of sizes and times of change of all files: whether what was checked is what is there."""


def annotations_of(recipe: CorpusRecipe) -> str:
    """Return where the annotations are: as the recipe says, else DATA_DIR/annotations, else DATA_DIR."""
    if recipe.annotations:
        return recipe.annotations
    beside = Path(recipe.data_dir) / "annotations"
    return str(beside if beside.is_dir() else recipe.data_dir)


def prepare_corpus(
    recipe: CorpusRecipe,
    total_stride: int,
    ranks: Ranks,
    log: Log,
    *,
    known: Normalization | None,
    checked: str,
) -> TrainingCorpus:
    """Read and check both splits, in shares over the ranks; every rank gets the same corpus or the same error.

    `known` is a normalisation to use instead of computing one; `checked` the `files_hash` of a corpus that an earlier
    attempt has read in full, in which case features are not read again.
    """
    train, dev = ranks.together(lambda: _read_both(recipe, log))
    dim = feature_dim(train)
    vocabulary = Vocabulary.build(clip.glosses for clip in train)
    feasible = [clip for clip in train if is_feasible(clip, total_stride)]
    infeasible = [clip.id for clip in train if not is_feasible(clip, total_stride)]
    if not feasible:
        raise InputError(
            f"{recipe.data_dir}: no training clip has the output frames CTC needs at total_stride {total_stride}; "
            "lower total_stride, or check that glosses and frames belong together"
        )
    if recipe.overfit_clips:
        feasible = feasible[: recipe.overfit_clips]
        dev = feasible
    files_hash = hash_files([*feasible, *dev])
    normalization = known
    # Times of change may differ between the machines' copies: one rank that must read makes all of them read.
    if any(ranks.gather_objects(checked != files_hash)) or normalization is None:
        moments, problems = scan_in_shares(feasible, dim, ranks, recipe.num_workers)
        if not recipe.overfit_clips:
            problems += scan_in_shares(dev, dim, ranks, recipe.num_workers)[1]
        if problems:
            more = [f"and {len(problems) - 10} more bad files ({len(problems)} in all)"] if len(problems) > 10 else []
            raise InputError(problems[:10] + more)
        normalization = normalization or from_moments(recipe.normalization, moments, dim)
    if normalization.feature_dim != dim:
        raise InputError(
            f"{recipe.data_dir}: features have D = {dim}, the stored normalisation {normalization.feature_dim}; "
            "use the features the run was started with, or a new output_dir"
        )
    return TrainingCorpus(
        train=feasible,
        dev=dev,
        infeasible=infeasible,
        vocabulary=vocabulary,
        normalization=normalization,
        clips_hash=hash_clips(feasible),
        files_hash=files_hash,
    )


def is_feasible(clip: Clip, total_stride: int) -> bool:
    """Tell whether CTC can emit the clip's glosses in its output frames."""
    return -(-clip.num_frames // total_stride) >= min_output_frames(clip.glosses)


def scan_in_shares(clips: Sequence[Clip], dim: int, ranks: Ranks, num_workers: int) -> tuple[list[Moments], list[str]]:
    """Read and check clips, each on one rank; return moments chunk by chunk, and what is wrong, on every rank."""
    chunks = range(0, len(clips), _CHUNK)
    mine: list[tuple[int, Moments | None, list[str]]] = []
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in chunks[ranks.rank :: ranks.world_size]:
            scans: list[ClipScan] = list(
                pool.map(lambda clip: scan_clip(clip.source, dim), clips[start : start + _CHUNK])
            )
            merged: Moments | None = None
            for scan in scans:
                if scan.moments is not None:
                    merged = scan.moments if merged is None else merged.merge(scan.moments)
            mine.append((start, merged, [scan.problem for scan in scans if scan.problem]))
    everyone = sorted((part for share in ranks.gather_objects(mine) for part in share), key=lambda part: part[0])
    problems = [problem for _, _, found in everyone for problem in found]
    return [moments for _, moments, _ in everyone if moments is not None], problems


def hash_clips(clips: Sequence[Clip]) -> str:
    """Hash which clips there are, in their order, with their frames and glosses."""
    rows = [(clip.id, clip.num_frames, clip.glosses) for clip in clips]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def hash_files(clips: Sequence[Clip]) -> str:
    """Hash the sizes and times of change of the clips' files, but not where they lie."""
    rows = [(clip.split, clip.id, (stat := clip.source.stat()).st_size, stat.st_mtime_ns) for clip in clips]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_both(recipe: CorpusRecipe, log: Log) -> tuple[list[Clip], list[Clip]]:
    """Read the training and the dev split; problems of both arrive together."""
    data_dir, annotations = Path(recipe.data_dir), annotations_of(recipe)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: expected the corpus folder with train/ and dev/, found none; mend --data_dir")
    splits: list[list[Clip]] = []
    problems: list[str] = []
    for split in ["train"] if recipe.overfit_clips else ["train", "dev"]:
        expected = feature_dim(splits[0]) if splits else None
        try:
            splits.append(
                read_split(
                    data_dir,
                    annotations,
                    split,
                    allow_missing=recipe.allow_missing,
                    log=log,
                    expected_dim=expected,
                )
            )
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    train, dev = splits[0], splits[-1]
    if dev is not train:
        shared = sorted({clip.id for clip in train} & {clip.id for clip in dev})
        if shared:
            log(f"warning: {len(shared)} clip ids are in train and in dev: {name_some(shared)}; check for a leak")
    return train, dev
