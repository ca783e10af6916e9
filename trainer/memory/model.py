"""The memory model: what a pass takes by what its cell holds, fitted to passes that were made.

Measured on the teacher: a pass takes what is proportional to the slots of its cell (its frames with their guards), and
a fixed part, the gradient of the largest weight above all. The scores that CTC reads lie padded to the longest clip and
are the third term; with 1,296 classes they show nothing, since the backward pass of the BiLSTM takes more, later. Terms
are never negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a cell holds."""

    slots: int
    """Frames on the model's time axis, guards included."""
    padded: int
    """Clips times output frames of the longest: the scores that CTC reads."""


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Bytes of a pass at its peak: `fixed + per_slot x slots + per_padded x padded`."""

    fixed: float
    per_slot: float
    per_padded: float

    def peak(self, load: Load) -> float:
        """Predict the bytes of a pass over a cell."""
        return self.fixed + self.per_slot * load.slots + self.per_padded * load.padded

    def largest_budget(self, capacity: int, *, margin: float, padding: float) -> int:
        """Return the most slots of a cell that fits `capacity` bytes less a share `margin`; 0 if none does.

        `padding`: padded output frames of a cell per slot, at the worst.
        """
        room = capacity * (1.0 - margin) - self.fixed
        each = self.per_slot + self.per_padded * padding
        if room <= 0:
            return 0
        return int(min(room / each, 2.0**53)) if each > 0 else 2**53

    def to_json(self) -> dict[str, float]:
        """Return what `memory.json` keeps."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> MemoryModel:
        """Build it from what `memory.json` keeps."""
        return cls(**{name: float(stored[name]) for name in ("fixed", "per_slot", "per_padded")})


def fit(loads: Sequence[Load], peaks: Sequence[float]) -> MemoryModel:
    """Fit a model to measured bytes by least squares under non-negative terms; needs one pass at least.

    Fewer passes than terms: the slots come first, so that a single pass is laid to them alone, which predicts more for
    larger cells than they will take.
    """
    rows = np.array([[load.slots, 1.0, load.padded] for load in loads])
    per_slot, fixed, per_padded = _non_negative(rows, np.array(peaks, dtype=np.float64)).tolist()
    return MemoryModel(fixed=fixed, per_slot=per_slot, per_padded=per_padded)


def _non_negative(rows: Floats, values: Floats) -> Floats:
    """Solve least squares under non-negative terms by trying every set of them: three terms are seven sets."""
    best, least = np.zeros(rows.shape[1]), float(values @ values)
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)
    for count in range(1, min(rows.shape) + 1):
        for chosen in itertools.combinations(range(rows.shape[1]), count):
            columns = list(chosen)
            found, *_ = np.linalg.lstsq(rows[:, columns] / scale[columns], values, rcond=None)
            found = found / scale[columns]
            rest = float(((values - rows[:, columns] @ found) ** 2).sum())
            # A further term must earn its place, and not by rounding.
            if (found >= 0).all() and rest < least - 1e-9 * float(values @ values):
                best, least = np.zeros(rows.shape[1]), rest
                best[columns] = found
    return best
