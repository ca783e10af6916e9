"""From a recipe to a checked corpus, in shares over the ranks, before any training time is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trainer.data.features import ClipScan, Moments
from trainer.data.normalization import Normalization, from_moments, of_frames
from trainer.data.opening import OpenCorpus, is_packed
from trainer.data.table import Split, shared_ids
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError, name_some
from trainer.randomness import clip_keys
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

    train: Split
    dev: Split
    infeasible: list[str]
    vocabulary: Vocabulary
    normalization: Normalization
    clips_hash: str
    """Hash of the training clips in their order, with frames and glosses: what the plan is made from."""
    is_packed: bool
    """Whether it was packed."""
    files_hash: str
    """Hash of the state of all files: whether what was checked is what is there."""


def prepare_corpus(
    recipe: CorpusRecipe,
    total_stride: int,
    ranks: Ranks,
    log: Log,
    *,
    known: Normalization | None,
    checked: str,
    video: bool = False,
) -> TrainingCorpus:
    """Read and check both splits, in shares over the ranks; every rank gets the same corpus or the same error.

    `known` is a normalisation to use instead of computing one; `checked` the `files_hash` of a corpus that an earlier
    attempt has read in full, in which case features are not read again; `video` whether the model takes frames.
    """
    train, dev, stored = ranks.together(lambda: _open_both(recipe, log, video))
    dim = train.feature_dim
    vocabulary = Vocabulary(train.table.all_glosses())
    whole, train = train, _select(train, recipe, log)
    feasible, infeasible = _divide(train, total_stride)
    if not len(feasible):
        raise InputError(
            f"{recipe.data_dir}: no training clip has the output frames CTC needs at total_stride {total_stride}; "
            "lower total_stride, or check that glosses and frames belong together"
        )
    if recipe.overfit_clips:
        feasible = feasible.choose(np.arange(min(recipe.overfit_clips, len(feasible))))
        dev, train, stored = feasible, feasible, None
    elif recipe.limit_clips:
        feasible, dev = (split.choose(np.arange(min(recipe.limit_clips, len(split)))) for split in (feasible, dev))
        train = feasible
    _check_files(list({id(split.table): split for split in (train, dev)}.values()), ranks)
    files_hash = _hash_files(train, dev)
    normalization = of_frames() if train.is_video else known
    if normalization is None and (stored is not None or recipe.normalization != "corpus"):
        normalization = from_moments(recipe.normalization, [stored] if stored else [], dim)
    # Records of a packed corpus were checked when it was packed, and have checksums. Times of change may differ
    # between the machines' copies: one rank that must read makes all of them read.
    unread = stored is None and any(ranks.gather_objects(checked != files_hash))
    if unread or normalization is None:
        # Over all frames of all training clips, so that neither is a property of what is left out.
        # Frames have no moments: a damaged video that --skip_clips names is not read.
        scanned = train if recipe.overfit_clips or recipe.limit_clips or train.is_video else whole
        moments, problems = scan_in_shares(scanned, ranks, recipe.num_workers)
        if dev is not train and unread:
            problems += scan_in_shares(dev, ranks, recipe.num_workers)[1]
        if problems:
            more = [f"and {len(problems) - 10} more bad files ({len(problems)} in all)"] if len(problems) > 10 else []
            raise InputError(problems[:10] + more)
        normalization = normalization or from_moments(recipe.normalization, moments, dim)
    if not train.is_video and normalization.feature_dim != dim:
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
        clips_hash=feasible.hash_clips(),
        is_packed=is_packed(recipe.data_dir),
        files_hash=files_hash,
    )


def _select(train: Split, recipe: CorpusRecipe, log: Log) -> Split:
    """Leave out and cut the training clips that the recipe says, and say which."""
    if recipe.skip_clips:
        keys = clip_keys(recipe.skip_clips)
        unknown = [name for name, key in zip(recipe.skip_clips, keys, strict=True) if key not in train.keys]
        if unknown:
            raise InputError(f"skip_clips: expected ids of training clips, found {name_some(unknown)}; correct them")
        log(f"{len(keys)} training clips are left out, as --skip_clips says: {name_some(recipe.skip_clips)}")
        train = train.choose(np.flatnonzero(~np.isin(train.keys, keys)))
    if recipe.max_frames:
        long = np.flatnonzero(train.num_frames > recipe.max_frames)
        if len(long):
            names = name_some([train.id(int(index)) for index in long[:11]])
            log(f"{len(long)} training clips are cut to {recipe.max_frames} frames, as --max_frames says: {names}")
        train = train.cut(recipe.max_frames)
    return train


def _divide(train: Split, total_stride: int) -> tuple[Split, list[str]]:
    """Part the clips that CTC can learn from from the others, which are named."""
    feasible = train.feasible(total_stride)
    if feasible.all():
        return train, []
    return train.choose(np.flatnonzero(feasible)), [train.id(int(index)) for index in np.flatnonzero(~feasible)]


def _check_files(splits: Sequence[Split], ranks: Ranks) -> None:
    """Look for files that are missing or not whole, in shares over the ranks."""
    mine = [problem for split in splits for problem in split.table.find_problems(ranks.rank, ranks.world_size)]
    problems = [problem for share in ranks.gather_objects(mine) for problem in share]
    if problems:
        more = [f"and {len(problems) - 10} more ({len(problems)} in all)"] if len(problems) > 10 else []
        raise InputError(problems[:10] + more)


def _hash_files(train: Split, dev: Split) -> str:
    return hashlib.sha256(f"{train.stamp()} {dev.stamp()}".encode()).hexdigest()


def scan_in_shares(clips: Split, ranks: Ranks, num_workers: int) -> tuple[list[Moments], list[str]]:
    """Read and check clips, each on one rank; return moments chunk by chunk, and what is wrong, on every rank."""
    chunks = range(0, len(clips), _CHUNK)
    mine: list[tuple[int, Moments | None, list[str]]] = []
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in chunks[ranks.rank :: ranks.world_size]:
            rows = [clips.row(index) for index in range(start, min(start + _CHUNK, len(clips)))]
            scans: list[ClipScan] = list(pool.map(clips.table.scan, rows))
            merged: Moments | None = None
            for scan in scans:
                if scan.moments is not None:
                    merged = scan.moments if merged is None else merged.merge(scan.moments)
            mine.append((start, merged, [scan.problem for scan in scans if scan.problem]))
    everyone = sorted((part for share in ranks.gather_objects(mine) for part in share), key=lambda part: part[0])
    problems = [problem for _, _, found in everyone for problem in found]
    return [moments for _, moments, _ in everyone if moments is not None], problems


def _open_both(recipe: CorpusRecipe, log: Log, video: bool) -> tuple[Split, Split, Moments | None]:
    """Open the training and the dev split, problems of both together; the moments are those stored, if any."""
    corpus = OpenCorpus(recipe, log, video=video)
    splits: list[Split] = []
    problems: list[str] = []
    for name in ["train"] if recipe.overfit_clips else ["train", "dev"]:
        try:
            splits.append(corpus.split(name, expected_dim=splits[0].feature_dim if splits else None))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    train, dev = splits[0], splits[-1]
    if dev is not train and (shared := shared_ids(train, dev)):
        log(f"warning: {shared}; check for a leak")
    return train, dev, corpus.moments
