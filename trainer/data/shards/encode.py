"""How features become stored values and back, and how far off they may be.

float16, scaled: stored = float16((x - center) / scale) with `scale` a power of two, so that the division is exact and
only two roundings count: |error| <= 2^-11 * |x - center|, plus one float32 rounding of x. (Deviations so small that
float16 holds them as subnormals add 2^-25 * scale, which is at most 2^-39 of the dimension's largest deviation.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.shards.format import Scaling, StorageType
from trainer.errors import InputError, name_some

HALF_MAX = 65504.0
"""The largest float16."""
BOUNDS = {
    ("float16", "deviation"): "2^-11 * |x - center|, and one float32 rounding of x",
    ("float16", "none"): "2^-11 * |x|, or 2^-25 where that is more",
    ("float32", "none"): "0",
}

_LARGEST_EXPONENT = 15
"""The largest deviation is stored between 2^14 and 2^15: float16 ends at 2^16, and its normal range at 2^-14."""
_LARGEST_DEVIATION = 1e38
_VALUES_PER_BLOCK = 1 << 15
# All there are: looking a float16 up takes half the time of converting it.
_FLOATS = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How values are stored; `center` and `scale` are float32 `[D]`, zeros and ones without scaling."""

    dtype: StorageType
    scaling: Scaling
    center: Floats
    scale: Floats


@dataclass(frozen=True, kw_only=True)
class RecordError:
    """How far a record's values are off."""

    largest: float = 0.0
    """Largest absolute error."""
    total: float = 0.0
    """Sum of absolute errors."""
    in_deviations: float = 0.0
    """Largest error in units of its dimension's standard deviation."""


def choose_encoding(dtype: StorageType, scaling: Scaling, mean: Floats, minimum: Floats, maximum: Floats) -> Encoding:
    """Choose center and scale per dimension from the training mean and the extremes of all splits, all `[D]`.

    Raises `InputError` for values so large that their deviations overflow.
    """
    if scaling == "none":
        return Encoding(dtype=dtype, scaling=scaling, center=np.zeros_like(mean), scale=np.ones_like(mean))
    constant = minimum == maximum
    center = np.where(constant, minimum, mean)
    with np.errstate(over="ignore"):
        deviation = np.maximum(np.abs(maximum - center), np.abs(minimum - center))
    if too_large := np.flatnonzero(~(deviation <= _LARGEST_DEVIATION)).tolist():
        raise InputError(
            f"dimensions {name_some([str(d) for d in too_large])} (counted from 0): expected deviations from the mean "
            f"of at most {_LARGEST_DEVIATION:g}, found larger ones; mend the extraction, or pack with --dtype float32"
        )
    exponent = np.maximum(np.frexp(deviation)[1] - _LARGEST_EXPONENT, -126)
    scale = np.where(constant, 1.0, np.ldexp(1.0, exponent)).astype(np.float32)
    return Encoding(dtype=dtype, scaling=scaling, center=center.astype(np.float32), scale=scale)


def find_overflow(features: Floats) -> tuple[int, int] | None:
    """Return (frame, dimension) of the first value of `[T, D]` that float16 cannot hold as it is, if there is one."""
    if max(features.max(), -features.min()) <= HALF_MAX:
        return None
    frame, dimension = np.argwhere(np.abs(features) > HALF_MAX)[0]
    return int(frame), int(dimension)


def encode(features: Floats, encoding: Encoding, inverse_spread: Floats) -> tuple[npt.NDArray[Any], RecordError]:
    """Return a clip `[T, D]` as it is stored, with its error; `inverse_spread` `[D]` is one over the deviations."""
    if encoding.dtype == "float32":
        return features, RecordError()
    stored = np.empty(features.shape, np.float16)
    dim = features.shape[1]
    rows = max(1, _VALUES_PER_BLOCK // dim)
    buffer, largest, total = np.empty((rows, dim), np.float32), np.zeros(dim, np.float32), 0.0
    # Both are powers of two: multiplying by the inverse is the exact division, in a fraction of the time.
    inverse = np.float32(1.0) / encoding.scale
    # In blocks that stay in the processor's cache.
    for start in range(0, len(features), rows):
        block = features[start : start + rows]
        work, half = buffer[: len(block)], stored[start : start + rows]
        np.subtract(block, encoding.center, out=work)
        np.multiply(work, inverse, out=work)
        np.copyto(half, work, casting="same_kind")
        _decode_into(work, half, encoding)
        np.subtract(work, block, out=work)
        np.abs(work, out=work)
        np.maximum(largest, work.max(axis=0), out=largest)
        total += float(work.sum(dtype=np.float64))
    return stored, RecordError(
        largest=float(largest.max()), total=total, in_deviations=float((largest * inverse_spread).max())
    )


def decode(stored: npt.NDArray[Any], encoding: Encoding) -> Floats:
    """Return the features `[T, D]` of stored values."""
    features = np.empty(stored.shape, np.float32)
    if encoding.dtype == "float32":
        np.copyto(features, stored)
    else:
        _decode_into(features, stored, encoding)
    return features


def largest_excess(features: Floats, decoded: Floats, encoding: Encoding) -> float:
    """Return the largest error in units of its bound over a clip `[T, D]`; above 1 the bound is broken."""
    rows = max(1, _VALUES_PER_BLOCK // features.shape[1])
    excess = 0.0
    for start in range(0, len(features), rows):
        exact = features[start : start + rows].astype(np.float64)
        found = decoded[start : start + rows].astype(np.float64)
        bound = np.abs(exact - encoding.center) * 2.0**-11
        bound += encoding.scale.astype(np.float64) * 2.0**-25
        # The rounding of the last addition.
        bound += np.abs(found) * 2.0**-24 + 2.0**-150
        excess = max(excess, float((np.abs(found - exact) / bound).max()))
    return excess


def _decode_into(features: Floats, stored: npt.NDArray[Any], encoding: Encoding) -> None:
    np.take(_FLOATS, stored.view(np.uint16), out=features, mode="clip")
    if encoding.scaling == "deviation":
        features *= encoding.scale
        features += encoding.center
