"""Augmentation: a pure function of the clip's key, within its named strengths, and off when it is off."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transforming import augment, resample
from trainer.data.augment import NO_AUGMENTATION, Augmentation, augmented_lengths
from trainer.randomness import clip_keys

KEYS = clip_keys([f"clip {i}" for i in range(2000)])


def only(**strengths: float) -> Augmentation:
    """Return an augmentation with nothing but these strengths."""
    values = {"rescale": 0.0, "frame_drop": 0.0, "time_mask": 0.0, "feature_mask": 0.0, "noise": 0.0}
    return Augmentation(**{**values, **strengths})


def make_clip(num_frames: int, dim: int = 6) -> np.ndarray:
    """Draw a clip in which no value is zero, so that what is masked shows."""
    clip = np.random.default_rng(num_frames).normal(size=(num_frames, dim)).astype(np.float32)
    return np.where(np.abs(clip) < 1e-3, np.float32(1), clip)


def as_is(clip: np.ndarray, key: int, strengths: Augmentation) -> np.ndarray:
    """Augment without a change of length."""
    return augment(clip.copy(), key, rescaled=len(clip), kept=len(clip), strengths=strengths)


def spans(marked: np.ndarray) -> list[int]:
    """Return the lengths of the runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


# Lengths.


def test_speed_changes_by_up_to_the_fraction_either_way_and_reaches_both_ends() -> None:
    frames = np.full(2000, 200)
    lengths = augmented_lengths(frames, np.ones(2000, dtype=np.int64), KEYS, only(rescale=0.2))
    assert lengths.rescaled.min() in (160, 161)
    assert lengths.rescaled.max() in (239, 240)
    assert lengths.rescaled.mean() == pytest.approx(200, abs=2)
    np.testing.assert_array_equal(lengths.kept, lengths.rescaled)


def test_dropping_leaves_out_up_to_the_fraction_of_the_rescaled_clip() -> None:
    frames = np.full(2000, 200)
    lengths = augmented_lengths(frames, np.ones(2000, dtype=np.int64), KEYS, only(frame_drop=0.1))
    np.testing.assert_array_equal(lengths.rescaled, 200)
    assert lengths.kept.min() == 181
    assert lengths.kept.max() == 200


@settings(max_examples=100, deadline=None)
@given(
    frames=st.lists(st.integers(min_value=1, max_value=300), min_size=1, max_size=20),
    rescale=st.floats(min_value=0, max_value=0.99),
    drop=st.floats(min_value=0, max_value=0.99),
    data=st.data(),
)
def test_no_clip_gets_shorter_than_its_fewest_frames(
    frames: list[int], rescale: float, drop: float, data: st.DataObject
) -> None:
    least = [data.draw(st.integers(min_value=1, max_value=n)) for n in frames]
    lengths = augmented_lengths(
        np.array(frames), np.array(least), KEYS[: len(frames)], only(rescale=rescale, frame_drop=drop)
    )
    assert (lengths.kept >= least).all()
    assert (lengths.kept <= lengths.rescaled).all()


def test_a_clips_length_does_not_depend_on_the_other_clips() -> None:
    frames, least = np.arange(50, 150), np.ones(100, dtype=np.int64)
    everyone = augmented_lengths(frames, least, KEYS[:100], Augmentation())
    few = augmented_lengths(frames[7:9], least[7:9], KEYS[7:9], Augmentation())
    np.testing.assert_array_equal(everyone.kept[7:9], few.kept)


# Resampling.


@settings(max_examples=60, deadline=None)
@given(before=st.integers(min_value=2, max_value=60), after=st.integers(min_value=2, max_value=120))
def test_a_straight_movement_stays_straight_and_its_ends_stay_in_place(before: int, after: int) -> None:
    ramp = np.linspace(-1.0, 3.0, before, dtype=np.float32)[:, None] * np.array([[1.0, -2.0]], dtype=np.float32)
    expected = np.linspace(-1.0, 3.0, after)[:, None] * np.array([[1.0, -2.0]])
    resampled = resample(ramp, after)
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, expected, atol=1e-5)
    np.testing.assert_array_equal(resampled[[0, -1]], ramp[[0, -1]])


def test_a_clip_of_one_frame_and_to_one_frame_can_be_resampled() -> None:
    clip = make_clip(1)
    np.testing.assert_array_equal(resample(clip, 5), np.repeat(clip, 5, axis=0))
    np.testing.assert_array_equal(resample(make_clip(9), 1), make_clip(9)[:1])


# Content.


def test_no_augmentation_changes_not_a_bit() -> None:
    clip = make_clip(50)
    np.testing.assert_array_equal(as_is(clip, int(KEYS[0]), NO_AUGMENTATION), clip)


def test_the_content_is_a_pure_function_of_the_key() -> None:
    clip = make_clip(60)
    one, again, other = (
        augment(clip.copy(), int(key), rescaled=66, kept=61, strengths=Augmentation())
        for key in (KEYS[0], KEYS[0], KEYS[1])
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.9
    assert one.shape == (61, 6)
    assert one.dtype == np.float32


def test_the_callers_clip_is_left_alone() -> None:
    clip = make_clip(40)
    before = clip.copy()
    augment(clip, int(KEYS[0]), rescaled=40, kept=40, strengths=Augmentation())
    np.testing.assert_array_equal(clip, before)


def test_dropped_frames_are_spread_and_the_rest_keep_their_order() -> None:
    clip = np.arange(100, dtype=np.float32)[:, None] + 1
    dropped = np.zeros(100)
    for key in KEYS[:400]:
        kept = augment(clip, int(key), rescaled=100, kept=80, strengths=only(frame_drop=0.2))[:, 0]
        assert len(kept) == 80
        assert (np.diff(kept) > 0).all()
        dropped[np.setdiff1d(np.arange(100), kept.astype(int) - 1)] += 1
    # 400 draws of 20 in 100: 80 each, standard deviation 8.
    assert np.abs(dropped - 80).max() < 5 * 8


def test_time_masks_silence_at_most_two_spans_of_the_named_fraction() -> None:
    clip = make_clip(100)
    sizes = []
    for key in KEYS[:300]:
        masked = as_is(clip, int(key), only(time_mask=0.1))
        silent = (masked == 0).all(axis=1)
        np.testing.assert_array_equal(masked[~silent], clip[~silent])
        found = spans(silent)
        assert len(found) <= 2
        assert silent.sum() <= 20
        sizes += found if len(found) == 2 else []
    assert max(sizes) == 10
    assert min(sizes) == 1


def test_feature_masks_silence_dimensions_for_the_whole_clip_up_to_the_named_fraction() -> None:
    clip = make_clip(20, dim=100)
    most = 0
    for key in KEYS[:300]:
        masked = as_is(clip, int(key), only(feature_mask=0.1))
        silent = (masked == 0).all(axis=0)
        np.testing.assert_array_equal(masked[:, ~silent], clip[:, ~silent])
        assert len(spans(silent)) <= 2
        most = max(most, int(silent.sum()))
    assert most == 10


def test_noise_has_the_named_standard_deviation_and_no_bias() -> None:
    clip = make_clip(1000, dim=50)
    noise = as_is(clip, int(KEYS[0]), only(noise=0.05)) - clip
    assert noise.std() == pytest.approx(0.05, rel=0.02)
    assert abs(noise.mean()) < 5 * 0.05 / np.sqrt(noise.size)


@pytest.mark.parametrize(("num_frames", "dim"), [(1, 1), (1, 500), (2, 1), (3, 2)])
def test_the_smallest_clips_survive_the_strongest_augmentation(num_frames: int, dim: int) -> None:
    strongest = Augmentation(rescale=0.9, frame_drop=0.9, time_mask=1.0, feature_mask=1.0, noise=1.0)
    for key in KEYS[:50]:
        clip = augment(make_clip(num_frames, dim), int(key), rescaled=num_frames + 1, kept=1, strengths=strongest)
        assert clip.shape == (1, dim)
        assert np.isfinite(clip).all()
