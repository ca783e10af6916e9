"""The plan: every clip once an epoch in a uniform order, from any position on, whatever divides the labour."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.augment import NO_AUGMENTATION, Augmentation
from trainer.data.lengths import draw_adjacent_repeats, draw_phoenix_lengths
from trainer.data.plan import Plan
from trainer.randomness import clip_keys, mix, uniform

STRIDE = 4


def make_plan(num_clips: int, **options: Any) -> Plan:
    """Plan clips with PHOENIX's lengths and glosses; each is feasible before augmentation."""
    frames, glosses = draw_phoenix_lengths(num_clips, seed=num_clips)
    values: dict[str, Any] = {
        "num_frames": frames,
        "min_outputs": glosses + draw_adjacent_repeats(frames, glosses, seed=1),
        "keys": clip_keys([f"clip {i}" for i in range(num_clips)]),
        "total_stride": STRIDE,
        "seed": 5,
        **options,
    }
    return Plan(**values)


def seen(plan: Plan, epoch: int, size: int, position: int = 0) -> list[int]:
    return [int(clip) for batch in plan.batches(epoch, size, position) for clip in batch.clips]


def outputs_of(frames: np.ndarray) -> np.ndarray:
    return -(-frames // STRIDE)


# Order and coverage.


@settings(max_examples=60, deadline=None)
@given(
    num_clips=st.integers(min_value=1, max_value=70),
    size=st.integers(min_value=1, max_value=80),
    epoch=st.integers(min_value=0, max_value=1000),
    alpha=st.sampled_from([0.0, 0.2]),
)
def test_an_epoch_holds_every_clip_exactly_once(num_clips: int, size: int, epoch: int, alpha: float) -> None:
    plan = make_plan(num_clips, mixup_alpha=alpha)
    batches = list(plan.batches(epoch, size))
    assert sorted(seen(plan, epoch, size)) == list(range(num_clips))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert [batch.position for batch in batches] == list(range(0, num_clips, size))
    assert {batch.epoch for batch in batches} == {epoch}


@settings(max_examples=100, deadline=None)
@given(num_clips=st.integers(min_value=1, max_value=60), data=st.data())
def test_going_on_with_other_batch_sizes_covers_exactly_the_unseen_clips(num_clips: int, data: st.DataObject) -> None:
    plan = make_plan(num_clips, mixup_alpha=0.3, augmentation=Augmentation())
    position, done = 0, []
    # A run interrupted again and again, each time on other hardware.
    while position < num_clips:
        size = data.draw(st.integers(min_value=1, max_value=20))
        steps = data.draw(st.integers(min_value=1, max_value=3))
        for batch in islice(plan.batches(3, size, position), steps):
            assert batch.position == position
            done += batch.clips.tolist()
            position += len(batch)
    assert sorted(done) == list(range(num_clips))


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(min_value=0, max_value=8), size=st.integers(min_value=1, max_value=9))
def test_going_on_with_the_same_batch_size_gives_the_same_batches(steps: int, size: int) -> None:
    plan = make_plan(50, mixup_alpha=0.3, augmentation=Augmentation())
    uninterrupted = list(plan.batches(2, size))[steps:]
    # What a new process computes, from its own copy of everything.
    resumed = list(make_plan(50, mixup_alpha=0.3, augmentation=Augmentation()).batches(2, size, steps * size))
    assert len(resumed) == len(uninterrupted)
    for one, other in zip(uninterrupted, resumed, strict=True):
        for name in ("clips", "partners", "shares", "num_frames"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_orders_differ_between_epochs_and_between_seeds() -> None:
    plan = make_plan(30)
    orders = [plan.order(epoch).tolist() for epoch in range(200)]
    orders += [replace(plan, seed=seed).order(0).tolist() for seed in range(6, 206)]
    assert len({tuple(order) for order in orders}) == 400
    assert plan.order(7).tolist() == orders[7]


def test_every_clip_is_as_likely_at_every_place_of_an_epoch() -> None:
    clips, epochs = 24, 4800
    plan = make_plan(clips)
    counts = np.zeros((clips, clips))
    for epoch in range(epochs):
        counts[plan.order(epoch), np.arange(clips)] += 1
    expected = epochs / clips
    # Rows and columns are fixed by the permutations: (clips - 1)^2 degrees of freedom, and a bound of 5 sigma.
    statistic = ((counts - expected) ** 2 / expected).sum() * (clips - 1) / clips
    freedom = (clips - 1) ** 2
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_any_two_clips_are_as_likely_to_meet_in_a_batch_however_long_they_are() -> None:
    clips, epochs, size = 20, 3000, 4
    plan = make_plan(clips, num_frames=np.arange(1, clips + 1) * 15, min_outputs=np.ones(clips, dtype=np.int64))
    meetings = np.zeros((clips, clips))
    for epoch in range(epochs):
        for batch in plan.batches(epoch, size):
            meetings[np.ix_(batch.clips, batch.clips)] += 1
    pairs = meetings[~np.eye(clips, dtype=bool)]
    expected = epochs * (size - 1) / (clips - 1)
    # A plan that sorted by length would let neighbours meet always and others never.
    assert np.abs(pairs - expected).max() < 6 * np.sqrt(expected)


# The shuffle window.


@settings(max_examples=60, deadline=None)
@given(
    num_clips=st.integers(min_value=1, max_value=90),
    size=st.integers(min_value=1, max_value=20),
    window=st.integers(min_value=2, max_value=6),
    epoch=st.integers(min_value=0, max_value=1000),
)
def test_a_window_sorts_what_was_drawn_uniformly_and_nothing_else(
    num_clips: int, size: int, window: int, epoch: int
) -> None:
    plan = make_plan(num_clips, shuffle_window=window)
    drawn, batches = plan.order(epoch), list(plan.batches(epoch, size))
    whole = num_clips - num_clips % size
    for start in range(0, whole, window * size):
        stop = min(start + window * size, whole)
        mine = [batch for batch in batches if start <= batch.position < stop]
        assert sorted(int(c) for b in mine for c in b.clips) == sorted(drawn[start:stop].tolist())
        # Cut from a sorted window: the batches' lengths do not overlap.
        spans = sorted((int(b.num_frames.min()), int(b.num_frames.max())) for b in mine)
        assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))
    if whole < num_clips:
        assert batches[-1].clips.tolist() == drawn[whole:].tolist()


def test_the_steps_of_a_window_are_not_ordered_by_length() -> None:
    plan = make_plan(400, shuffle_window=10)
    rising = [
        [float(b.num_frames.mean()) for b in plan.batches(epoch, 10)][start : start + 10]
        for epoch in range(10)
        for start in range(0, 40, 10)
    ]
    assert sum(means == sorted(means) for means in rising) == 0
    first = [means.index(min(means)) for means in rising]
    assert len(set(first)) > 5


def test_a_window_makes_the_clips_of_a_step_alike() -> None:
    def spread(window: int) -> float:
        plan = make_plan(4000, shuffle_window=window)
        return float(np.mean([b.num_frames.max() / b.num_frames.mean() for b in plan.batches(0, 16)]))

    assert spread(1) > 1.5
    assert spread(8) < 1.25
    assert spread(32) < 1.1


@settings(max_examples=40, deadline=None)
@given(window=st.integers(min_value=1, max_value=5), steps=st.integers(min_value=0, max_value=7))
def test_a_batch_of_another_size_goes_on_with_the_clips_not_yet_seen(window: int, steps: int) -> None:
    plan = make_plan(61, shuffle_window=window)
    before = [int(c) for batch in list(plan.batches(3, 8))[:steps] for c in batch.clips]
    after = [int(c) for batch in plan.batches(3, 5, position=len(before), drawn_size=8) for c in batch.clips]
    assert sorted(before + after) == list(range(61))


# Augmented lengths.


@settings(max_examples=60, deadline=None)
@given(
    rescale=st.floats(min_value=0, max_value=0.95),
    drop=st.floats(min_value=0, max_value=0.95),
    epoch=st.integers(min_value=0, max_value=10**6),
    stride=st.sampled_from([1, 2, 4]),
)
def test_augmentation_never_makes_a_feasible_clip_infeasible(
    rescale: float, drop: float, epoch: int, stride: int
) -> None:
    plan = make_plan(60, augmentation=Augmentation(rescale=rescale, frame_drop=drop), total_stride=stride)
    lengths = plan.lengths(epoch)
    assert (-(-lengths.kept // stride) >= plan.min_outputs).all()
    assert (lengths.kept <= lengths.rescaled).all()
    for batch in plan.batches(epoch, 7):
        np.testing.assert_array_equal(batch.num_frames, lengths.kept[batch.clips])


def test_a_clip_that_only_just_fits_keeps_every_frame_it_needs() -> None:
    # 5 glosses need 17 frames at stride 4: ceil(17 / 4) = 5.
    plan = make_plan(
        1,
        num_frames=np.array([17]),
        min_outputs=np.array([5]),
        augmentation=Augmentation(rescale=0.5, frame_drop=0.5),
    )
    kept = np.array([plan.lengths(epoch).kept[0] for epoch in range(300)])
    assert kept.min() == 17
    assert kept.max() > 17


def test_lengths_change_from_epoch_to_epoch_and_without_augmentation_never() -> None:
    plan = make_plan(50, augmentation=Augmentation())
    assert (plan.lengths(0).kept != plan.lengths(1).kept).mean() > 0.8
    still = make_plan(50, augmentation=NO_AUGMENTATION)
    np.testing.assert_array_equal(still.lengths(3).kept, still.num_frames)


# Mixup.


def test_partners_are_of_the_same_batch_and_never_get_the_larger_share() -> None:
    plan = make_plan(200, mixup_alpha=0.2)
    mixed = 0
    for epoch in range(20):
        for batch in plan.batches(epoch, 16):
            assert set(batch.partners) <= set(batch.clips)
            assert (batch.shares >= 0.5).all()
            assert (batch.shares <= 1.0).all()
            alone = batch.partners == batch.clips
            np.testing.assert_array_equal(batch.shares[alone], 1.0)
            mixed += int((~alone).sum())
    assert mixed > 0.8 * 20 * 200


def test_a_partner_whose_glosses_do_not_fit_the_clip_is_not_mixed_in() -> None:
    # Even clips are short, odd ones have more glosses than a short clip has output frames.
    short = np.arange(40) % 2 == 0
    plan = make_plan(
        40,
        num_frames=np.where(short, 40, 160),
        min_outputs=np.where(short, 5, 25),
        mixup_alpha=0.5,
        augmentation=Augmentation(),
    )
    into_short = into_long = 0
    for epoch in range(10):
        for batch in plan.batches(epoch, 16):
            assert (plan.min_outputs[batch.partners] <= outputs_of(batch.num_frames)).all()
            mixed = batch.partners != batch.clips
            into_short += int((mixed & short[batch.clips] & ~short[batch.partners]).sum())
            into_long += int((mixed & ~short[batch.clips] & short[batch.partners]).sum())
    assert into_short == 0
    assert into_long > 50


def test_shares_follow_the_beta_distribution_folded_at_one_half() -> None:
    alpha = 0.4
    plan = make_plan(400, mixup_alpha=alpha)
    shares = np.concatenate(
        [batch.shares[batch.partners != batch.clips] for epoch in range(20) for batch in plan.batches(epoch, 100)]
    )
    draws = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    expected = np.maximum(draws, 1 - draws)
    assert shares.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert shares.std() == pytest.approx(expected.std(), abs=0.01)


def test_without_mixup_every_clip_is_its_own_partner() -> None:
    for batch in make_plan(30, mixup_alpha=0.0).batches(0, 8):
        np.testing.assert_array_equal(batch.partners, batch.clips)
        np.testing.assert_array_equal(batch.shares, 1.0)


# Keys.


def test_keys_belong_to_a_clips_name_and_not_to_its_place_in_the_corpus() -> None:
    names = [f"clip {i}" for i in range(20)]
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(clip_keys(names)[order], clip_keys([names[i] for i in order]))
    # The value itself is part of the promise: another machine, another Python, the same draws.
    assert clip_keys(["clip 0"]).tolist() == [0x1FDD157BFD2F123A]
    assert mix(clip_keys(["clip 0"]), 1).tolist() == [6651925778130150707]


def test_augmentation_and_dropout_keys_differ_by_clip_epoch_seed_and_use() -> None:
    plan = make_plan(50)
    keys = np.concatenate(
        [
            draw
            for seed in (1, 2)
            for epoch in range(20)
            for draw in (
                replace(plan, seed=seed).augment_keys(epoch),
                replace(plan, seed=seed).dropout_keys(epoch),
            )
        ]
    )
    assert len(np.unique(keys)) == len(keys)


def test_uniform_draws_are_uniform_and_salts_make_them_independent() -> None:
    keys = clip_keys([f"clip {i}" for i in range(20_000)])
    one, other = uniform(keys, 1), uniform(keys, 2)
    for draws in (one, other):
        assert 0 <= draws.min() <= draws.max() < 1
        counts, _ = np.histogram(draws, bins=20, range=(0, 1))
        assert ((counts - 1000.0) ** 2 / 1000).sum() < 19 + 6 * np.sqrt(38)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.04
    # Salts are positions, not a sum.
    assert not np.array_equal(mix(keys, 1, 2), mix(keys, 2, 1))
