"""The loader: each rank gets the content its cells name, ahead of time, and a bad clip ends the run by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.transforming import CPU, augment, resample
from trainer.data.augment import NO_AUGMENTATION, Augmentation
from trainer.data.batch import MicroBatch
from trainer.data.corpus import Clip
from trainer.data.features import scan_clip
from trainer.data.loader import EvaluationLoader, StepShare, TrainingLoader, make_plan
from trainer.data.normalization import Normalization, from_moments
from trainer.data.prefetch import background, prefetch
from trainer.data.table import Split, folder_split
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError
from trainer.layout import lay_out
from trainer.objectives.ctc import ctc_objective
from trainer.recipe import ObjectiveRecipe

DIM, STRIDE, NUM_CLIPS = 5, 4, 13
GLOSSES = ["REGEN", "WIND", "SONNE", "SCHNEE"]


@dataclass(frozen=True)
class Corpus:
    """A small corpus on disk, and its normalised features computed here by hand."""

    clips: list[Clip]
    split: Split
    normalization: Normalization
    vocabulary: Vocabulary
    normalized: list[np.ndarray]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    draws = np.random.default_rng(3)
    clips, features = [], []
    for index in range(NUM_CLIPS):
        glosses = tuple(draws.choice(GLOSSES, size=2 + index % 4))
        raw = draws.normal(loc=50, scale=7, size=(int(draws.integers(30, 90)), DIM)).astype(np.float32)
        source = tmp_path / f"clip{index}.npz"
        np.savez(source, features=raw)
        features.append(raw)
        clips.append(
            Clip(id=f"clip{index}", split="train", signer="", num_frames=len(raw), glosses=glosses, source=source)
        )
    moments = [scan.moments for scan in (scan_clip(clip.source) for clip in clips) if scan.moments]
    frames = np.concatenate(features).astype(np.float64)
    return Corpus(
        clips=clips,
        split=folder_split("train", clips, DIM, tmp_path),
        normalization=from_moments("corpus", moments, DIM),
        vocabulary=Vocabulary(GLOSSES),
        normalized=[((raw - frames.mean(axis=0)) / frames.std(axis=0)).astype(np.float32) for raw in features],
    )


def make_loader(
    corpus: Corpus,
    *,
    loss_normalization: str = "clip_target",
    mixup_alpha: float = 0.0,
    augmentation: Augmentation = NO_AUGMENTATION,
    num_workers: int = 0,
) -> TrainingLoader:
    return TrainingLoader(
        split=corpus.split,
        normalization=corpus.normalization,
        plan=make_plan(corpus.split, total_stride=STRIDE, seed=1, augmentation=augmentation, mixup_alpha=mixup_alpha),
        vocabulary=corpus.vocabulary,
        objective=ObjectiveRecipe(loss_normalization=cast(Any, loss_normalization), mixup_alpha=mixup_alpha),
        num_workers=num_workers,
        device=CPU,
    )


def load(
    loader: TrainingLoader, *, epoch: int = 0, position: int = 0, size: int = 6, world_size: int = 1, budget: int = 200
) -> list[tuple[StepShare, list[list[MicroBatch]]]]:
    """Return every step of an epoch with the cells of all ranks."""
    ranks = [
        [
            (share, [keep(cell) for cell in cells])
            for share, cells in loader.steps(
                epoch, position, size=size, rank=rank, world_size=world_size, budget=budget
            )
        ]
        for rank in range(world_size)
    ]
    return [(steps[0][0], [cells for _, cells in steps]) for steps in zip(*ranks, strict=True)]


def keep(cell: MicroBatch) -> MicroBatch:
    """Copy a cell's features: they are valid until the next cell is asked for."""
    return replace(cell, features=cell.features.clone())


def split_features(cell: MicroBatch, batch_frames: dict[int, int]) -> dict[int, np.ndarray]:
    """Return the features of each clip of a cell."""
    parts = cell.features.split([batch_frames[clip] for clip in cell.clips])
    return {clip: part.numpy() for clip, part in zip(cell.clips, parts, strict=True)}


# Content.


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(("world_size", "budget"), [(1, 10_000), (1, 1), (2, 150), (3, 200), (8, 100)])
def test_cells_hold_the_normalised_features_and_glosses_of_their_clips(
    corpus: Corpus, world_size: int, budget: int, num_workers: int
) -> None:
    loader = make_loader(corpus, num_workers=num_workers)
    epoch: list[int] = []
    for share, ranks in load(loader, world_size=world_size, budget=budget):
        met: list[int] = []
        assert {len(cells) for cells in ranks} == {share.allotment.cells_per_rank}
        for cell in (cell for cells in ranks for cell in cells if cell.clips):
            frames = {clip: len(corpus.normalized[clip]) for clip in cell.clips}
            for clip, features in split_features(cell, frames).items():
                np.testing.assert_allclose(features, corpus.normalized[clip], atol=1e-5)
            classes = cell.labels.classes.split(cell.labels.lengths.tolist())
            for clip, labels in zip(cell.clips, classes, strict=True):
                assert corpus.vocabulary.decode(labels.tolist()) == list(corpus.clips[clip].glosses)
            assert cell.layout.output_lengths == tuple(-(-frames[clip] // STRIDE) for clip in cell.clips)
            assert cell.partner_labels is None
            met += cell.clips
        assert sorted(met) == sorted(share.batch.clips.tolist())
        assert share.frames == sum(len(corpus.normalized[clip]) for clip in met)
        epoch += met
    assert sorted(epoch) == list(range(NUM_CLIPS))


def test_augmented_and_mixed_content_is_the_same_on_any_hardware_and_as_the_plan_says(corpus: Corpus) -> None:
    strengths = Augmentation()
    reference: dict[int, np.ndarray] = {}
    seeds: dict[int, torch.Tensor] = {}
    for world_size, budget, num_workers in [(1, 10_000, 0), (2, 200, 2), (3, 1, 1), (8, 100, 0)]:
        loader = make_loader(corpus, mixup_alpha=0.4, augmentation=strengths, num_workers=num_workers)
        plan = loader.plan
        lengths, keys = plan.lengths(2), plan.augment_keys(2)

        def alone(clip: int, lengths: Any = lengths, keys: Any = keys) -> np.ndarray:
            return augment(
                corpus.normalized[clip].copy(),
                int(keys[clip]),
                rescaled=int(lengths.rescaled[clip]),
                kept=int(lengths.kept[clip]),
                strengths=strengths,
            )

        for share, ranks in load(loader, epoch=2, world_size=world_size, budget=budget):
            batch = share.batch
            row = {int(clip): i for i, clip in enumerate(batch.clips)}
            for cell in (cell for cells in ranks for cell in cells if cell.clips):
                frames = {clip: int(batch.num_frames[row[clip]]) for clip in cell.clips}
                for clip, features in split_features(cell, frames).items():
                    share_of_clip, partner = batch.shares[row[clip]], int(batch.partners[row[clip]])
                    mixed = share_of_clip * alone(clip) + (1 - share_of_clip) * resample(alone(partner), frames[clip])
                    np.testing.assert_allclose(features, mixed, atol=1e-4)
                    np.testing.assert_array_equal(reference.setdefault(clip, features), features)
                assert cell.layout.row_seeds is not None
                dense = cell.layout.row_seeds[cell.layout.dense_order].split(list(cell.layout.output_lengths))
                for clip, seed in zip(cell.clips, dense, strict=True):
                    assert torch.equal(seeds.setdefault(clip, seed), seed)
                    key = plan.dropout_keys(2)[[clip]]
                    alone_ = lay_out(np.array([frames[clip]]), STRIDE, key).row_seeds
                    assert alone_ is not None
                    assert torch.equal(seed, alone_)
    assert sorted(reference) == list(range(NUM_CLIPS))


def test_mixed_clips_carry_their_partners_glosses_with_the_rest_of_the_weight(corpus: Corpus) -> None:
    loader = make_loader(corpus, mixup_alpha=0.4, loss_normalization="clip")
    mixed = 0
    for share, ranks in load(loader, world_size=2):
        batch = share.batch
        row = {int(clip): i for i, clip in enumerate(batch.clips)}
        for cell in (cell for cells in ranks for cell in cells if cell.clips):
            rows = [row[clip] for clip in cell.clips]
            torch.testing.assert_close(cell.labels.weights, torch.tensor(batch.shares[rows], dtype=torch.float32))
            if cell.partner_labels is None:
                assert (batch.partners[rows] == batch.clips[rows]).all()
                continue
            torch.testing.assert_close(cell.labels.weights + cell.partner_labels.weights, torch.ones(len(rows)))
            classes = cell.partner_labels.classes.split(cell.partner_labels.lengths.tolist())
            for partner, labels in zip(batch.partners[rows], classes, strict=True):
                assert corpus.vocabulary.decode(labels.tolist()) == list(corpus.clips[partner].glosses)
            mixed += int((batch.partners[rows] != batch.clips[rows]).sum())
    assert mixed > 3


def test_going_on_in_the_middle_of_an_epoch_gives_the_cells_that_were_left(corpus: Corpus) -> None:
    loader = make_loader(corpus, mixup_alpha=0.4, augmentation=Augmentation(), num_workers=2)
    whole, rest = load(loader, size=4), load(loader, size=4, position=8)
    assert len(rest) == len(whole) - 2
    for (_, [cells]), (_, [again]) in zip(whole[2:], rest, strict=True):
        for cell, other in zip(cells, again, strict=True):
            assert cell.clips == other.clips
            assert torch.equal(cell.features, other.features)


# Weights and denominators.


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["clip_target", "clip", "target"])
def test_weights_and_denominators_are_those_of_the_whole_global_batch(
    corpus: Corpus, kind: str, mixup_alpha: float, world_size: int
) -> None:
    loader = make_loader(corpus, loss_normalization=kind, mixup_alpha=mixup_alpha)
    glosses = [len(clip.glosses) for clip in corpus.clips]
    for share, ranks in load(loader, world_size=world_size, size=6):
        batch = share.batch
        pairs = list(zip(batch.clips, batch.partners, batch.shares, strict=True))
        expected = {
            "clip_target": (lambda clip: 1 / glosses[clip], len(pairs)),
            "clip": (lambda clip: 1.0, len(pairs)),
            "target": (lambda clip: 1.0, sum(s * glosses[c] + (1 - s) * glosses[p] for c, p, s in pairs)),
        }
        weight_of, denominator = expected[kind]
        assert share.denominator == pytest.approx(denominator)
        got: dict[int, tuple[float, float]] = {}
        for cell in (cell for cells in ranks for cell in cells if cell.clips):
            others = cell.labels.weights * 0 if cell.partner_labels is None else cell.partner_labels.weights
            for clip, weight, other in zip(cell.clips, cell.labels.weights, others, strict=True):
                got[clip] = float(weight), float(other)
        for clip, partner, part in pairs:
            assert got[clip] == pytest.approx((part * weight_of(clip), (1 - part) * weight_of(partner)))


def test_a_dummy_weighs_nothing_and_has_a_finite_loss(corpus: Corpus) -> None:
    loader = make_loader(corpus)
    [(share, ranks), *_] = load(loader, world_size=8, size=5)
    idle = [cell for cells in ranks for cell in cells if not cell.clips]
    assert len(idle) == 3
    assert share.denominator == 5
    for cell in idle:
        assert cell.features.shape == (STRIDE, DIM)
        assert not cell.features.any()
        assert cell.layout.output_lengths == (1,)
        assert cell.layout.row_seeds is not None
        logits = torch.randn(1, len(corpus.vocabulary), requires_grad=True)
        loss = ctc_objective(logits, cell.layout.output_lengths, cell.labels, cell.partner_labels, 0.1)
        loss.backward()
        assert loss.item() == 0.0
        assert logits.grad is not None
        assert not logits.grad.any()


def test_slots_are_what_the_model_computes_on(corpus: Corpus) -> None:
    for share, ranks in load(make_loader(corpus), world_size=2):
        assert share.slots == sum(cell.layout.length for cells in ranks for cell in cells if cell.clips)


# Bad clips.


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_a_clip_that_turns_bad_ends_the_epoch_by_name(corpus: Corpus, damage: str, num_workers: int) -> None:
    bad = corpus.clips[7].source
    if damage == "deleted":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"clip7\.npz"):
        load(make_loader(corpus, num_workers=num_workers), size=4)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("change", ["frames", "dimensions"])
def test_a_clip_that_was_replaced_since_it_was_checked_is_refused_by_name(corpus: Corpus, change: str) -> None:
    clip = corpus.clips[7]
    shape = (clip.num_frames + 5, DIM) if change == "frames" else (clip.num_frames, DIM + 1)
    np.savez(clip.source, features=np.ones(shape, dtype=np.float32))
    with pytest.raises(InputError, match=r"clip7\.npz"):
        load(make_loader(corpus))
    with pytest.raises(InputError, match=r"clip7\.npz"):
        list(make_evaluation_loader(corpus).cells(rank=0, world_size=1, budget=200))


# Reading ahead.


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
def test_results_come_in_the_order_of_their_requests(num_workers: int) -> None:
    naps = np.random.default_rng(0).uniform(0, 0.003, 60)

    def slowly(number: int) -> int:
        time.sleep(naps[number])
        return number

    assert list(prefetch(range(60), slowly, num_workers)) == list(range(60))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_reading_ahead_is_bounded_whatever_the_number_of_requests(num_workers: int) -> None:
    asked = 0

    def endless() -> Iterator[int]:
        nonlocal asked
        while True:
            yield asked
            asked += 1

    results = prefetch(endless(), lambda number: number, num_workers)
    for number in range(20):
        assert next(results) == number
        # Those given out, those in flight, and the one that the counter has not left yet.
        assert asked + 1 <= (number + 1) + 2 * num_workers + 1
    results.close()


def test_reading_really_runs_ahead_of_its_consumer() -> None:
    loaded: list[int] = []
    results = prefetch(range(20), lambda number: loaded.append(number), 2)
    next(results)
    deadline = time.monotonic() + 5
    while len(loaded) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(loaded) == 5
    results.close()


def test_without_workers_nothing_is_read_before_it_is_asked_for() -> None:
    loaded: list[int] = []
    results = prefetch(range(20), lambda number: loaded.append(number), 0)
    next(results)
    next(results)
    assert loaded == [0, 1]
    results.close()


@pytest.mark.timeout(60)
def test_an_error_is_raised_at_its_place_and_no_thread_outlives_it() -> None:
    def fragile(number: int) -> int:
        if number == 7:
            raise InputError("clip 7: damaged")
        return number

    got = []
    with pytest.raises(InputError, match="clip 7: damaged"):  # noqa: PT012
        for number in prefetch(range(1000), fragile, 3):
            got.append(number)
    assert got == list(range(7))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.timeout(60)
def test_what_works_in_the_background_is_in_order_bounded_and_raises_at_its_place() -> None:
    made = []

    def fragile() -> Iterator[int]:
        for number in range(50):
            if number == 30:
                raise InputError("step 30: impossible")
            made.append(number)
            yield number

    got = []
    with pytest.raises(InputError, match="step 30: impossible"):  # noqa: PT012
        for number in background(fragile(), 4):
            got.append(number)
            # Those given out, those that wait, and the one that is about to.
            assert len(made) <= len(got) + 4 + 1
    assert got == list(range(30))
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


@pytest.mark.timeout(60)
def test_leaving_the_background_early_stops_it_and_discards_what_was_ready() -> None:
    discarded: list[int] = []
    items = background(iter(range(100)), 3, discarded.append)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert discarded
    assert sorted(discarded) == list(range(2, 2 + len(discarded)))
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_leaving_early_stops_the_threads(corpus: Corpus) -> None:
    steps = make_loader(corpus, num_workers=2).steps(0, 0, size=2, rank=0, world_size=1, budget=100)
    _, cells = next(steps)
    next(cells)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


# Evaluation.


def make_evaluation_loader(corpus: Corpus, num_workers: int = 0) -> EvaluationLoader:
    return EvaluationLoader(
        split=corpus.split,
        normalization=corpus.normalization,
        vocabulary=corpus.vocabulary,
        total_stride=STRIDE,
        num_workers=num_workers,
        device=CPU,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_evaluation_meets_each_clip_once_and_every_rank_as_many_cells(
    corpus: Corpus, world_size: int, num_workers: int
) -> None:
    loader = make_evaluation_loader(corpus, num_workers)
    ranks = [
        [keep(cell) for cell in loader.cells(rank=rank, world_size=world_size, budget=150)]
        for rank in range(world_size)
    ]
    assert len({len(cells) for cells in ranks}) == 1
    met: list[int] = []
    for cell in (cell for cells in ranks for cell in cells if cell.clips):
        frames = {clip: len(corpus.normalized[clip]) for clip in cell.clips}
        for clip, features in split_features(cell, frames).items():
            np.testing.assert_allclose(features, corpus.normalized[clip], atol=1e-5)
        assert cell.layout.row_seeds is None
        assert cell.labels.weights.tolist() == [1.0] * len(cell.clips)
        met += cell.clips
    assert sorted(met) == list(range(NUM_CLIPS))


def test_clips_without_a_loss_stay_in_the_evaluation_and_weigh_nothing(corpus: Corpus) -> None:
    foreign = Clip(**{**as_dict(corpus.clips[0]), "glosses": ("REGEN", "HAGEL")})
    # 25 repeats need 49 output frames; fewer than 90 frames give at most 23.
    crowded = Clip(**{**as_dict(corpus.clips[1]), "glosses": ("WIND",) * 25})
    clips = [foreign, crowded, corpus.clips[2]]
    loader = EvaluationLoader(
        split=folder_split("train", clips, DIM, Path("corpus")),
        normalization=corpus.normalization,
        vocabulary=corpus.vocabulary,
        total_stride=STRIDE,
        num_workers=0,
        device=CPU,
    )
    weights = {}
    for cell in loader.cells(rank=0, world_size=1, budget=1000):
        weights |= dict(zip(cell.clips, cell.labels.weights.tolist(), strict=True))
        assert (cell.labels.classes > 0).all()
    assert weights == {0: 0.0, 1: 0.0, 2: 1.0}


def test_evaluation_refuses_features_that_are_not_finite_by_name(corpus: Corpus) -> None:
    clip = corpus.clips[4]
    features = np.ones((clip.num_frames, DIM), dtype=np.float32)
    features[3, 2] = np.nan
    np.savez(clip.source, features=features)
    with pytest.raises(InputError, match=r"clip4\.npz.*frame 3"):
        list(make_evaluation_loader(corpus, num_workers=2).cells(rank=0, world_size=1, budget=200))


def as_dict(clip: Clip) -> dict[str, Any]:
    return {name: getattr(clip, name) for name in ("id", "split", "signer", "num_frames", "glosses", "source")}
