"""Normalisation: exact over all training frames, harmless on constant dimensions, and stored with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transforming import normalize as apply
from trainer.data.corpus import Clip
from trainer.data.features import scan_clip
from trainer.data.normalization import Normalization, from_moments
from trainer.data.prepare import scan_in_shares
from trainer.data.table import Split, folder_split
from trainer.errors import InputError


class Rank:
    """One of several ranks that read in shares; the test passes on what they gather."""

    def __init__(self, rank: int, world_size: int, items: list[Any]) -> None:
        self.rank, self.world_size, self.items = rank, world_size, items

    def together(self, act: Callable[[], Any]) -> Any:
        return act()

    def gather_objects(self, item: Any) -> list[Any]:
        self.items[self.rank] = item
        return [part for part in self.items if part is not None]


def write_clips(folder: Path, arrays: list[np.ndarray]) -> list[Clip]:
    clips = []
    for index, array in enumerate(arrays):
        source = folder / f"{index}.npz"
        np.savez(source, features=array)
        clips.append(
            Clip(id=str(index), split="train", signer="", num_frames=len(array), glosses=("A",), source=source)
        )
    return clips


def split_of(clips: list[Clip], dim: int = 7) -> Split:
    return folder_split("train", clips, dim, Path("corpus"))


def normalize(clips: list[Clip], kind: str = "corpus") -> Normalization:
    dim = np.load(clips[0].source)["features"].shape[1]
    moments = [scan.moments for scan in (scan_clip(clip.source) for clip in clips) if scan.moments]
    return from_moments(cast(Any, kind), moments, dim)


def draw_clips(count: int, *, mean: float = 0.0, spread: float = 1.0, dim: int = 7, seed: int = 0) -> list[np.ndarray]:
    draws = np.random.default_rng(seed)
    means = mean * draws.uniform(0.5, 1.5, dim)
    return [
        draws.normal(means, spread, size=(int(draws.integers(1, 60)), dim)).astype(np.float32) for _ in range(count)
    ]


@settings(max_examples=25, deadline=None)
@given(
    mean=st.sampled_from([0.0, 1.0, 260.0, 1e4, -1e5]),
    spread=st.sampled_from([0.5, 3.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_merged_moments_are_those_of_all_frames_even_far_from_zero(
    tmp_path_factory: pytest.TempPathFactory, mean: float, spread: float, seed: int
) -> None:
    arrays = draw_clips(12, mean=mean, spread=spread, seed=seed)
    frames = np.concatenate(arrays).astype(np.float64)
    got = normalize(write_clips(tmp_path_factory.mktemp("clips"), arrays))
    np.testing.assert_allclose(got.mean, frames.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.scale, 1 / frames.std(axis=0), rtol=1e-5)


def test_the_training_split_becomes_zero_mean_and_unit_variance(tmp_path: Path) -> None:
    arrays = draw_clips(20, mean=100.0, spread=4.0)
    normalization = normalize(write_clips(tmp_path, arrays))
    frames = np.concatenate([apply(normalization, array) for array in arrays])
    np.testing.assert_allclose(frames.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(frames.std(axis=0), 1, atol=1e-4)


@pytest.mark.parametrize("kind", ["corpus", "clip"])
@pytest.mark.parametrize("value", [0.0, 0.1, -260.0, 1e6])
def test_a_constant_dimension_becomes_zero_and_stays_finite(tmp_path: Path, kind: str, value: float) -> None:
    arrays = draw_clips(6)
    for array in arrays:
        array[:, 2] = value
    normalization = normalize(write_clips(tmp_path, arrays), kind)
    assert np.isfinite(normalization.scale).all()
    for array in arrays:
        normalized = apply(normalization, array)
        assert np.isfinite(normalized).all()
        # What rounding leaves of the constant must not be blown up to unit variance.
        assert np.abs(normalized[:, 2]).max() <= 1e-6 * max(1.0, abs(value))


@pytest.mark.parametrize("kind", ["corpus", "clip"])
@pytest.mark.parametrize("value", [0.1, 260.0])
def test_a_dimension_that_varies_by_rounding_alone_is_not_blown_up_to_noise(
    tmp_path: Path, kind: str, value: float
) -> None:
    arrays = draw_clips(6)
    for array in arrays:
        array[:, 2] = value
        array[::2, 2] = np.nextafter(np.float32(value), np.float32(np.inf))
    normalization = normalize(write_clips(tmp_path, arrays), kind)
    for array in arrays:
        assert np.abs(apply(normalization, array)[:, 2]).max() < 1e-4


def test_a_dimension_of_small_but_real_variance_is_not_taken_for_constant(tmp_path: Path) -> None:
    arrays = draw_clips(10, spread=1.0)
    for array in arrays:
        # As in real key points, where 2,039 dimensions have variances under 1e-3.
        array[:, 3] = 0.5 + 1e-4 * array[:, 3]
    normalization = normalize(write_clips(tmp_path, arrays))
    frames = np.concatenate([apply(normalization, array) for array in arrays])
    assert frames[:, 3].std() == pytest.approx(1.0, abs=1e-2)


def test_per_clip_normalisation_makes_each_clip_zero_mean_and_unit_variance(tmp_path: Path) -> None:
    arrays = [array for array in draw_clips(12, mean=50.0, spread=3.0) if len(array) > 1]
    normalization = normalize(write_clips(tmp_path, arrays), "clip")
    for array in arrays:
        normalized = apply(normalization, array)
        np.testing.assert_allclose(normalized.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(normalized.std(axis=0), 1, atol=1e-4)


def test_a_clip_of_one_frame_is_normalised_to_zero_by_itself(tmp_path: Path) -> None:
    array = draw_clips(1)[0][:1]
    normalization = normalize(write_clips(tmp_path, [array]), "clip")
    np.testing.assert_array_equal(apply(normalization, array), 0)


def test_none_leaves_every_bit(tmp_path: Path) -> None:
    arrays = draw_clips(4, mean=50.0)
    normalization = normalize(write_clips(tmp_path, arrays), "none")
    for array in arrays:
        np.testing.assert_array_equal(apply(normalization, array), array)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_reading_in_shares_gives_the_same_bits_on_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    clips = write_clips(tmp_path, draw_clips(150, mean=100.0))
    alone, _ = scan_in_shares(split_of(clips), Rank(0, 1, [None]), 2)
    gathered: list[Any] = [None] * world_size
    shares = [scan_in_shares(split_of(clips), Rank(rank, world_size, gathered), 2)[0] for rank in range(world_size)]
    one, many = from_moments("corpus", alone, 7), from_moments("corpus", shares[-1], 7)
    np.testing.assert_array_equal(one.mean, many.mean)
    np.testing.assert_array_equal(one.scale, many.scale)


def test_reading_in_shares_returns_what_is_wrong_with_every_bad_file(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, draw_clips(20))
    for clip in clips[4:]:
        clip.source.write_bytes(b"not an archive")
    _, problems = scan_in_shares(split_of(clips), Rank(0, 1, [None]), 2)
    assert len(problems) == 16
    assert all(str(clip.source) in problem for clip, problem in zip(clips[4:], problems, strict=True))


@pytest.mark.parametrize("kind", ["corpus", "clip", "none"])
def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    normalization = normalize(write_clips(tmp_path, draw_clips(5, mean=3.0)), kind)
    normalization.save(tmp_path / "normalization.safetensors")
    loaded = Normalization.load(tmp_path / "normalization.safetensors")
    assert loaded.kind == kind
    assert loaded.feature_dim == 7
    for one, other in ((loaded.mean, normalization.mean), (loaded.scale, normalization.scale)):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\x10" + b"\0" * 40])
def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "normalization.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"normalization\.safetensors: not a stored normalisation"):
        Normalization.load(path)
