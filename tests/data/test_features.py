"""Feature files: any honest npz is read, every bad one is refused by name, and its moments are exact."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.features import Moments, feature_paths, peek_shape, read_features, scan_clip
from trainer.errors import InputError


def make_features(num_frames: int = 7, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_frames, dim)).astype(np.float32)


def save(path: Path, save_arrays: Callable[..., None] = np.savez, **arrays: np.ndarray) -> Path:
    save_arrays(path, **arrays)
    return path


def problem_of(path: Path) -> str:
    """Return the one message of a bad file, having seen that reading and scanning agree on it."""
    with pytest.raises(InputError) as caught:
        read_features(path)
    [problem] = caught.value.problems
    assert problem.startswith(str(path))
    scan = scan_clip(path, None)
    assert (scan.problem, scan.moments, scan.num_frames) == (problem, None, 0)
    return problem


def peek_problem_of(path: Path) -> str:
    """As `problem_of`, for problems that the header alone shows."""
    with pytest.raises(InputError) as caught:
        peek_shape(path)
    assert str(caught.value) == problem_of(path)
    return str(caught.value)


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_layout_reads_as_float32_rows(
    tmp_path: Path, savez: Callable[..., None], dtype: str, order: Any, check_finite: bool
) -> None:
    expected = make_features().astype(np.float16).astype(np.float32)
    savez(tmp_path / "a.npz", features=expected.astype(dtype, order=order), video_id=np.array("a"))
    features = read_features(tmp_path / "a.npz", check_finite=check_finite)
    np.testing.assert_array_equal(features, expected)
    assert features.dtype == np.float32
    assert features.dtype.isnative
    assert features.flags.c_contiguous
    assert features.flags.writeable
    assert peek_shape(tmp_path / "a.npz") == (7, 5)


def test_a_single_array_needs_no_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", arr_0=make_features())
    assert peek_shape(path) == (7, 5)
    np.testing.assert_array_equal(read_features(path), make_features())


def test_peeking_reads_no_features(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", features=make_features(1000, 100))
    content = bytearray(path.read_bytes())
    content[1000:-1000] = bytes(len(content) - 2000)
    path.write_bytes(content)
    assert peek_shape(path) == (1000, 100)
    assert "cut short, damaged" in problem_of(path)


def test_several_arrays_without_features_are_named(tmp_path: Path) -> None:
    problem = peek_problem_of(save(tmp_path / "a.npz", pose=make_features(), hands=make_features()))
    assert "expected an array `features`, or a single array, found pose, hands" in problem
    assert "name the one with the features `features`" in problem


def test_an_archive_without_arrays_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "nothing here")
    assert "expected an array `features`, found no array; save it" in peek_problem_of(tmp_path / "a.npz")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_a_truncated_file_is_refused(tmp_path: Path, savez: Callable[..., None], size: int) -> None:
    path = tmp_path / "a.npz"
    savez(path, features=make_features(100))
    path.write_bytes(path.read_bytes()[:size])
    problem = peek_problem_of(path)
    assert "expected an npz file, found one that is cut short, damaged" in problem
    assert "extract or copy it again" in problem


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_a_flipped_byte_is_caught_by_the_archive_s_checksum(tmp_path: Path, savez: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    savez(path, features=make_features(100))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in problem_of(path)


def test_an_array_shorter_than_its_header_says_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, make_features())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("features.npy", buffer.getvalue()[:-4])
    assert "its size does not fit shape [7, 5]" in peek_problem_of(tmp_path / "a.npz")


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(pickle.dumps(make_features()))
    assert "another format (File is not a zip file)" in peek_problem_of(tmp_path / "a.npz")


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    assert "does not exist; extract the clip" in peek_problem_of(tmp_path / "a.npz")
    (tmp_path / "b.npz").mkdir()
    assert "cannot be read (Is a directory); mend the path" in peek_problem_of(tmp_path / "b.npz")


class Bomb:
    """Fails the test if anything unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickled array was loaded",)


def test_a_pickled_array_is_refused_and_never_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", features=np.array([Bomb(), Bomb()], dtype=object))
    problem = peek_problem_of(path)
    assert "array `features`: expected floats, found pickled Python objects, which are never loaded" in problem
    assert "np.stack(frames).astype(np.float32)" in problem


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64])
def test_values_that_are_not_floats_are_refused(tmp_path: Path, dtype: type) -> None:
    problem = peek_problem_of(save(tmp_path / "a.npz", features=np.ones((7, 5), dtype)))
    assert f"expected float16, float32 or float64, found {np.dtype(dtype)}; save it with" in problem


@pytest.mark.parametrize("shape", [(5,), (7, 5, 3), ()])
def test_a_wrong_rank_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    problem = peek_problem_of(save(tmp_path / "a.npz", features=np.ones(shape, np.float32)))
    assert f"expected shape [T, D], found {list(shape)}; save it as one row per frame" in problem


@pytest.mark.parametrize("shape", [(0, 5), (7, 0)])
def test_no_frames_or_no_dimensions_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    problem = peek_problem_of(save(tmp_path / "a.npz", features=np.ones(shape, np.float32)))
    assert f"expected at least one frame and dimension, found {list(shape)}; drop the clip" in problem


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, np.float32), (np.inf, np.float16), (-np.inf, np.float64), (1e39, np.float64)],
)
def test_values_that_are_not_finite_in_float32_are_placed(tmp_path: Path, value: float, dtype: type) -> None:
    features: np.ndarray = make_features().astype(dtype)
    features[3, 2] = features[5, 0] = features[5, 1] = value
    path = save(tmp_path / "a.npz", features=features)
    problem = problem_of(path)
    assert "found 3 that are NaN, infinite or too large, in 2 of 7 frames" in problem
    assert f"the first at frame 3, dimension 2 (counted from 0): {value}; fill them" in problem
    assert read_features(path, check_finite=False).shape == (7, 5)


def test_scanning_holds_a_clip_to_the_dimensions_of_the_others(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", features=make_features())
    assert scan_clip(path, 5).problem is None
    assert scan_clip(path, 6).problem == (f"{path}: expected D = 6 as in the other clips, found 5; extract it anew")


def test_merged_moments_equal_those_of_all_frames_at_large_offsets(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    offsets = np.resize([0, 1, 260, -1e4], 700)
    clips = [(rng.normal(size=(n, 700)) * 0.01 + offsets).astype(np.float32) for n in (1, 16, 299)]
    merged: Moments | None = None
    for index, features in enumerate(clips):
        scan = scan_clip(save(tmp_path / f"{index}.npz", features=features), 700)
        assert (scan.num_frames, scan.dim) == features.shape
        assert scan.moments is not None
        merged = scan.moments if merged is None else merged.merge(scan.moments)
    frames = np.concatenate(clips).astype(np.float64)
    assert merged is not None
    assert merged.count == len(frames)
    np.testing.assert_allclose(merged.mean, frames.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.m2 / merged.count, frames.var(axis=0), rtol=1e-9)


def test_names_that_begin_with_the_split_have_two_places(tmp_path: Path) -> None:
    assert feature_paths(tmp_path, "train", "a/b") == (tmp_path / "train/a/b.npz",)
    assert feature_paths(tmp_path, "train", "train/b") == (
        tmp_path / "train/train/b.npz",
        tmp_path / "train/b.npz",
    )
