"""Packed corpora: the same clips as in their folder, to the bit or within the bound, and damage is said by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import pack
from trainer.data.augment import NO_AUGMENTATION, Augmentation
from trainer.data.batch import MicroBatch
from trainer.data.cells import CellLoader
from trainer.data.features import read_features
from trainer.data.loader import EvaluationLoader, TrainingLoader, make_plan
from trainer.data.normalization import Normalization, from_moments
from trainer.data.opening import OpenCorpus
from trainer.data.prepare import TrainingCorpus, prepare_corpus
from trainer.data.shards.format import MANIFEST
from trainer.data.table import Split
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError
from trainer.recipe import CorpusRecipe, ObjectiveRecipe

CPU = torch.device("cpu")
STRIDE = 4


class OneRank:
    rank, world_size = 0, 1

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]

    def together(self, act: Any) -> Any:
        return act()


def prepare(data_dir: Path | str, **fields: Any) -> TrainingCorpus:
    recipe = CorpusRecipe(data_dir=str(data_dir), **fields)
    return prepare_corpus(recipe, STRIDE, OneRank(), lambda text: None, known=None, checked="")


def open_split(data_dir: Path, name: str = "train") -> Split:
    return OpenCorpus(CorpusRecipe(data_dir=str(data_dir)), lambda text: None).split(name)


def make_loader(
    split: Split,
    normalization: Normalization,
    augmentation: Augmentation = NO_AUGMENTATION,
    mixup_alpha: float = 0.0,
    num_workers: int = 0,
) -> TrainingLoader:
    return TrainingLoader(
        split=split,
        normalization=normalization,
        plan=make_plan(split, total_stride=STRIDE, seed=1, augmentation=augmentation, mixup_alpha=mixup_alpha),
        vocabulary=Vocabulary(split.table.all_glosses()),
        objective=ObjectiveRecipe(),
        num_workers=num_workers,
        device=CPU,
    )


def cells_of(loader: TrainingLoader, budget: int = 300) -> list[MicroBatch]:
    steps = loader.steps(1, 0, size=7, rank=0, world_size=1, budget=budget)
    return [replace(cell, features=cell.features.clone()) for _, cells in steps for cell in cells]


def assert_same(one: list[MicroBatch], other: list[MicroBatch], atol: float = 0.0) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.clips == b.clips
        assert torch.equal(a.labels.classes, b.labels.classes)
        torch.testing.assert_close(a.features, b.features, atol=atol, rtol=0.0)


def damaged(packed: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


def shards(folder: Path, split: str = "train") -> list[Path]:
    return sorted((folder / "shards").glob(f"{split}-*"))


# The same clips.


def test_a_packed_corpus_is_the_folder_it_was_packed_from(corpus: Path, packed: Path) -> None:
    one, other = prepare(corpus), prepare(packed)
    assert len(shards(packed)) > 1
    assert one.vocabulary == other.vocabulary
    assert one.clips_hash == other.clips_hash
    assert one.infeasible == other.infeasible
    np.testing.assert_array_equal(one.normalization.mean, other.normalization.mean)
    np.testing.assert_array_equal(one.normalization.scale, other.normalization.scale)
    for mine, theirs in ((one.train, other.train), (one.dev, other.dev)):
        for name in ("num_frames", "num_glosses", "min_outputs", "keys"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        for index in range(len(mine)):
            assert mine.id(index) == theirs.id(index)
            assert mine.signer(index) == theirs.signer(index)
            assert mine.glosses(index) == theirs.glosses(index)


def test_stored_values_are_the_features_to_the_bit_or_within_the_stated_bound(corpus: Path, packed: Path) -> None:
    folder, shard = open_split(corpus), open_split(packed)
    center = shard.storage.center if shard.storage.center is not None else np.zeros(shard.feature_dim)
    for index in range(len(folder)):
        features = read_features(folder.table.clips[index].source)  # type: ignore[attr-defined]
        buffer = np.empty(features.shape, shard.storage.dtype)
        got = shard.storage.decode(shard.read(index, buffer))
        if shard.storage.dtype == np.float32:
            np.testing.assert_array_equal(got, features)
        else:
            rounding = 2.0**-22 * np.abs(features)
            assert (np.abs(got - features) <= 2.0**-11 * np.abs(features - center) + rounding).all()


@pytest.mark.parametrize("kind", ["corpus", "clip", "none"])
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, Augmentation()])
def test_batches_from_shards_are_those_from_files(
    corpus: Path, packed: Path, kind: Any, mixup_alpha: float, augmentation: Augmentation
) -> None:
    folder, shard = open_split(corpus), open_split(packed)
    moments = [scan.moments for scan in map(folder.table.scan, range(len(folder))) if scan.moments]
    normalization = from_moments(kind, moments, folder.feature_dim)
    one, other = (cells_of(make_loader(split, normalization, augmentation, mixup_alpha)) for split in (folder, shard))
    assert_same(one, other, atol=0.0 if shard.storage.dtype == np.float32 else 0.01)


def test_some_clips_of_a_packed_split_are_those_clips(corpus: Path, packed: Path) -> None:
    # The overfit test takes a few training clips, and scans them alone.
    one, other = prepare(corpus, overfit_clips=5), prepare(packed, overfit_clips=5)
    assert len(one.train) == len(other.train) == 5
    assert one.clips_hash == other.clips_hash
    np.testing.assert_allclose(one.normalization.mean, other.normalization.mean, atol=1e-3)
    loaders = (make_loader(part.train, one.normalization) for part in (one, other))
    assert_same(*(cells_of(loader) for loader in loaders), atol=0.01)


# Where and when the work is done.


@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, Augmentation()])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["corpus", "packed"])
def test_transforming_on_the_device_gives_the_bits_of_transforming_on_the_host(
    request: pytest.FixtureRequest, packed: Path, source: str, num_workers: int, augmentation: Augmentation
) -> None:
    split = open_split(request.getfixturevalue(source))
    normalization = prepare(packed).normalization
    host = make_loader(split, normalization, augmentation, 0.3, num_workers)
    device = make_loader(split, normalization, augmentation, 0.3, num_workers)
    # The path of a GPU, with a CPU in its place: stored values in the buffers, and all else after the copy.
    device.cell_loader = CellLoader(
        split, normalization, noise=augmentation.noise, num_workers=num_workers, device=CPU, on_host=False
    )
    assert device.cell_loader.pool.acquire(1).tensor.dtype == getattr(torch, split.storage.dtype.name)
    assert_same(cells_of(host), cells_of(device))


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_number_of_threads_changes_no_bit(packed: Path, num_threads: int) -> None:
    split, before = open_split(packed), torch.get_num_threads()
    normalization = prepare(packed).normalization
    expected = cells_of(make_loader(split, normalization, Augmentation()))
    try:
        torch.set_num_threads(num_threads)
        assert_same(expected, cells_of(make_loader(split, normalization, Augmentation(), num_workers=2)))
    finally:
        torch.set_num_threads(before)


def test_buffers_are_reused_and_bounded(packed: Path) -> None:
    loader = make_loader(open_split(packed), prepare(packed).normalization, num_workers=2)
    addresses = set()
    for epoch in range(4):
        for _, cells in loader.steps(epoch, 0, size=7, rank=0, world_size=1, budget=200):
            for cell in cells:
                addresses.add(cell.features.data_ptr())
    pool = loader.cell_loader.pool
    assert pool.limit == 2 * 2 + 2
    assert pool.bytes_held <= pool.limit * 400 * loader.split.feature_dim * 4
    # Some 48 cells in all; a buffer of another capacity may take the place of one that is free.
    assert len(addresses) <= 2 * pool.limit


# Damage.


def test_a_flipped_byte_is_named_by_clip_and_shard(packed: Path, tmp_path: Path) -> None:
    folder = damaged(packed, tmp_path)
    split = open_split(folder)
    name, offset = split.table._place(3)  # type: ignore[attr-defined]
    content = bytearray((folder / name).read_bytes())
    content[offset + 10] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: the record of clip {split.id(3)} .* checksum differs; copy it"):
        cells_of(make_loader(split, prepare(packed).normalization, num_workers=2))
    evaluation = EvaluationLoader(
        split=split,
        normalization=prepare(packed).normalization,
        vocabulary=Vocabulary(split.table.all_glosses()),
        total_stride=STRIDE,
        num_workers=2,
        device=CPU,
    )
    with pytest.raises(InputError, match=split.id(3)):
        list(evaluation.cells(rank=0, world_size=1, budget=200))


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_shard_that_is_not_whole_is_said_before_training(packed: Path, tmp_path: Path, damage: str) -> None:
    folder = damaged(packed, tmp_path)
    first, second = shards(folder)[0], shards(folder, "dev")[0]
    for shard in (first, second):
        if damage == "missing":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError) as caught:
        prepare(folder)
    assert len(caught.value.problems) == 2
    assert all(path.name in text for path, text in zip((first, second), caught.value.problems, strict=True))


def test_an_index_of_another_packing_is_refused(corpus: Path, packed: Path, tmp_path: Path) -> None:
    folder = damaged(packed, tmp_path)
    other = pack(corpus, tmp_path / "other", "--shard_mb", "0.02")
    shutil.copy(other / "index-train.safetensors", folder)
    with pytest.raises(InputError, match=r"index-train\.safetensors: differs from what manifest\.json says"):
        prepare(folder)


@pytest.mark.parametrize("name", ["index-dev.safetensors", "statistics.safetensors", "vocabulary.json", MANIFEST])
def test_a_damaged_small_file_is_refused_by_name(packed: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(packed, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        prepare(folder)


def test_another_version_of_the_format_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = damaged(packed, tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(InputError, match="expected signscale-shards version 1, found signscale-shards version 99"):
        prepare(folder)


def test_a_manifest_that_names_files_elsewhere_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = damaged(packed, tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["name"] = "../../etc/passwd"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: expected the manifest of a packed corpus, found a damaged"):
        prepare(folder)


def test_what_a_packed_corpus_cannot_do_is_said(packed: Path) -> None:
    with pytest.raises(InputError, match="expected a split test2, found dev, test, train"):
        open_split(packed, "test2")
    with pytest.raises(InputError, match=r"annotations: .* is a packed corpus, which brings its own"):
        OpenCorpus(CorpusRecipe(data_dir=str(packed), annotations="elsewhere"), print)
