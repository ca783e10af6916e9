"""Feature files: one npz per clip with an array `features`, float [T, D]."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.data.npy import read_npy_header
from trainer.errors import InputError, name_some

_KEY = "features"
_DIMS_PER_BLOCK = 256
_ACCEPTED = (np.float16, np.float32, np.float64)
# What a damaged archive makes zipfile, zlib and numpy raise; RuntimeError covers encryption.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Per-dimension moments of a set of frames.

    Kept as mean and sum of squared deviations, since a plain sum of squares cancels for dimensions whose
    mean is large beside their spread, as uncentred coordinates are.
    """

    count: int
    """Number of frames."""
    mean: NDArray[np.float64]
    """Mean over the frames, [D]."""
    m2: NDArray[np.float64]
    """Sum over the frames of squared deviations from the mean, [D]; m2 / count is the variance."""

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of frames together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta * delta * (self.count * other.count / count),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipScan:
    """What one pass over a feature file found: its moments, or a problem."""

    num_frames: int = 0
    """Frames of the clip; 0 with a problem."""
    dim: int = 0
    """Values per frame; 0 with a problem."""
    moments: Moments | None = None
    """Moments of the clip's frames; None with a problem."""
    problem: str | None = None
    """What is wrong with the file and how to mend it; None if nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """Where the array lies inside its archive, and its npy header."""

    info: zipfile.ZipInfo
    shape: tuple[int, int]
    dtype: np.dtype
    fortran_order: bool
    header_size: int


def feature_paths(data_dir: Path, split: str, clip_id: str) -> tuple[Path, ...]:
    """List the places where a clip's feature file may lie, the preferred one first.

    Copies of PHOENIX-2014T name their clips `train/…`; extractors put those either below the split's folder
    like any other name, or take the name as a path inside the data directory.
    """
    below_split = data_dir / split / f"{clip_id}.npz"
    if clip_id.startswith(f"{split}/"):
        return below_split, data_dir / f"{clip_id}.npz"
    return (below_split,)


def peek_shape(path: Path) -> tuple[int, int]:
    """Return (T, D) of a feature file from its header alone.

    Raises `InputError` for a file that is missing, cut short, pickled, not float or not [T, D].
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _find_member(path, archive).shape
    except (OSError, *_UNREADABLE) as error:
        raise _describe_unreadable(path, error) from None


def read_features(path: Path, *, check_finite: bool = True) -> NDArray[np.float32]:
    """Read the features of one clip, float32 [T, D], C-contiguous and writable.

    `check_finite=False` is for files that passed `scan_clip`: it leaves out the search for NaN and infinite
    values and, for uncompressed files, the archive's checksum. Raises `InputError` for a bad file.
    """
    original = _read_array(path, verify=check_finite)
    with np.errstate(over="ignore"):
        features = np.require(original, np.float32, ["C", "W"])
    if check_finite and not np.isfinite(features).all():
        raise _describe_non_finite(path, original, features)
    return features


def scan_clip(path: Path, expected_dim: int | None = None) -> ClipScan:
    """Check one feature file in full and gather its moments, in one reading.

    Never raises for a bad file: the problem is returned, so that all bad files are reported together.
    """
    try:
        features = read_features(path)
    except InputError as error:
        return ClipScan(problem=str(error))
    num_frames, dim = features.shape
    if expected_dim is not None and dim != expected_dim:
        return ClipScan(
            problem=f"{path}: expected D = {expected_dim} as in the other clips, found {dim}; extract it anew"
        )
    return ClipScan(num_frames=num_frames, dim=dim, moments=moments_of(features))


def moments_of(features: NDArray[np.float32]) -> Moments:
    """Return the moments of the frames of one clip `[T, D]`."""
    num_frames, dim = features.shape
    mean, m2 = np.empty(dim), np.empty(dim)
    # In blocks: a float64 copy of the whole clip would cost more in page faults than the sums themselves.
    for start in range(0, dim, _DIMS_PER_BLOCK):
        block = slice(start, start + _DIMS_PER_BLOCK)
        deviations = features[:, block].astype(np.float64)
        mean[block] = deviations.mean(axis=0)
        deviations -= mean[block]
        m2[block] = np.einsum("td,td->d", deviations, deviations)
    return Moments(count=num_frames, mean=mean, m2=m2)


def _find_member(path: Path, archive: zipfile.ZipFile) -> _Member:
    """Find the array of features in the archive and check its header."""
    names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    if not names:
        raise InputError(f"{path}: expected an array `{_KEY}`, found no array; save it with np.savez")
    if _KEY not in names and len(names) > 1:
        raise InputError(
            f"{path}: expected an array `{_KEY}`, or a single array, found {name_some(names)}; name the one "
            f"with the features `{_KEY}`"
        )
    key = _KEY if _KEY in names else names[0]
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as file:
        shape, dtype, fortran_order, header_size = read_npy_header(file)
    what = f"{path}: array `{key}`"
    if dtype.hasobject:
        raise InputError(
            f"{what}: expected floats, found pickled Python objects, which are never loaded; save it as one "
            "array: np.stack(frames).astype(np.float32)"
        )
    if dtype.newbyteorder("=") not in _ACCEPTED:
        raise InputError(
            f"{what}: expected float16, float32 or float64, found {dtype}; save it with .astype(np.float32)"
        )
    if len(shape) != 2:
        raise InputError(f"{what}: expected shape [T, D], found {list(shape)}; save it as one row per frame")
    if 0 in shape:
        raise InputError(f"{what}: expected at least one frame and dimension, found {list(shape)}; drop the clip")
    if info.file_size != header_size + math.prod(shape) * dtype.itemsize:
        raise EOFError(f"its size does not fit shape {list(shape)}")
    return _Member(info=info, shape=shape, dtype=dtype, fortran_order=fortran_order, header_size=header_size)


def _read_array(path: Path, *, verify: bool) -> NDArray[np.floating]:
    """Read the array as it is stored; it may be read-only."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            member = _find_member(path, archive)
            if member.info.compress_type == zipfile.ZIP_STORED and not verify:
                # Straight into the array, five times as fast as through zipfile.
                file.seek(_find_data(file, member.info) + member.header_size)
                flat = np.fromfile(file, member.dtype, math.prod(member.shape))
            else:
                flat = np.frombuffer(archive.read(member.info), member.dtype, offset=member.header_size)
            return flat.reshape(member.shape, order="F" if member.fortran_order else "C")
    except (OSError, *_UNREADABLE) as error:
        raise _describe_unreadable(path, error) from None


def _find_data(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return where an uncompressed member's data begins: after its local header, 30 bytes, name and extra."""
    file.seek(info.header_offset)
    name_size, extra_size = struct.unpack_from("<HH", file.read(30), 26)
    return info.header_offset + 30 + name_size + extra_size


def _describe_unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: feature file does not exist; extract the clip or remove its annotation")
    if isinstance(error, OSError):
        return InputError(f"{path}: cannot be read ({error.strerror or error}); mend the path or its rights")
    return InputError(
        f"{path}: expected an npz file, found one that is cut short, damaged or of another format ({error}); "
        "extract or copy it again"
    )


def _describe_non_finite(path: Path, original: NDArray, features: NDArray[np.float32]) -> InputError:
    bad = ~np.isfinite(features)
    frame, dimension = np.argwhere(bad)[0]
    return InputError(
        f"{path}: expected finite float32 values, found {bad.sum()} that are NaN, infinite or too large, in "
        f"{bad.any(axis=1).sum()} of {len(bad)} frames, the first at frame {frame}, dimension {dimension} "
        f"(counted from 0): {original[frame, dimension]}; fill them at extraction or drop the clip"
    )
