"""The cost model: how long a rank's share of a step takes, fitted to the steps of a run.

    seconds = per_slot * slots + per_walk * walks + per_cell * cells

`slots` are the frames on the packed time axis (no padding, so that there is no term for it), `walks` the output frames
of each cell's longest clip, summed over the cells: a recurrent layer walks them one after the other. What a step costs
besides, the optimizer and the all-reduce, ends up in the term of the cells. Squares of slots and walks were tried on
timings of the 25 M teacher on a CPU and explained nothing more.

A fitted model never enters the allotment by itself: it changes who computes what, and with it the order in which
numbers are added up.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.allotment import Allotment
from trainer.errors import InputError

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

COST_MODEL = "cost_model.json"
"""Name of the file in a run directory."""

_FORMAT, _VERSION = "signscale-cost-model", 1
_LARGEST_WALK = 10_000
"""Slots that one output frame of a walk may weigh at most, where next to no time hangs on the slots."""
_WARM_UP = 10
"""First steps of an attempt, in which kernels are chosen, memory is reserved and files are read for the first time."""
_CAPACITY = 4096
_FEWEST_SAMPLES = 32
_LARGEST_ERROR = 0.05
"""Standard error of each term, as a share of the mean step: with a larger one the samples cannot tell terms apart."""
_TIMER_NOISE = 0.005
"""Relative noise that is assumed at least: samples that agree better than clocks do prove no more."""
_OUTLIER_MADS = 3.0
_TO_DEVIATION = 1.4826
"""Standard deviations of normal noise in its median absolute deviation."""
_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a rank's forward and backward passes; all coefficients are at least 0."""

    per_slot: float
    """Seconds per frame of the packed time axis, guards included."""
    per_walk: float
    """Seconds per output frame of a cell's longest clip."""
    per_cell: float
    """Seconds per cell, whatever it holds."""
    samples: int
    """Steps that the fit kept; 0: not fitted."""
    residual: float
    """Root mean square of the relative error over these steps."""

    def seconds(self, slots: npt.ArrayLike, walks: npt.ArrayLike, cells: npt.ArrayLike) -> Floats:
        """Predict the seconds of shares with these slots, summed longest walks and cells, `[n]` each or numbers."""
        terms = (self.per_slot, slots), (self.per_walk, walks), (self.per_cell, cells)
        return np.asarray(sum(coefficient * np.asarray(count, dtype=np.float64) for coefficient, count in terms))

    def sequential(self, outputs: Indices) -> Indices:
        """Return what `allot` takes as `sequential`: the walks along clips of `outputs` frames, in slots, `[n]`.

        Rounded to integers, so that all ranks agree on who computes what.
        """
        # Next to no time may hang on the slots; only the ratio's order matters then.
        ratio = self.per_walk / max(self.per_slot, self.per_walk / _LARGEST_WALK) if self.per_walk else 0.0
        return np.rint(ratio * np.asarray(outputs, dtype=np.float64)).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return what `cost_model.json` holds."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> CostModel:
        """Read a cost model; raises `InputError` for another format or version, or a damaged one."""
        mend = f"copy {COST_MODEL} again from the run that measured it, or leave --cost_model out"
        try:
            stored = json.loads(text)
            kind, version = stored.pop("format"), stored.pop("version")
            if kind == _FORMAT and version != _VERSION:
                raise InputError(f"{where}: expected {_FORMAT} version {_VERSION}, found version {version}; {mend}")
            model = cls(**stored)
            numbers = asdict(model).values()
            sound = all(type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers)
            if kind != _FORMAT or not sound or type(model.samples) is not int or model.per_slot + model.per_walk == 0:
                raise ValueError("no cost model")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{where}: expected a cost model as JSON, found a damaged file; {mend}") from None
        return model


FRAMES_ONLY = CostModel(per_slot=1.0, per_walk=0.0, per_cell=0.0, samples=0, residual=0.0)
"""Counts frames: what the allotment balances by unless told otherwise."""


def read_cost_model(path: Path) -> CostModel:
    """Read a cost model from its file, or from the run directory that holds it.

    Raises `InputError` if there is none, or a damaged one.
    """
    file = path / COST_MODEL if path.is_dir() else path
    try:
        text = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"{file}: cost model cannot be read ({error.strerror}); name a {COST_MODEL}, or a run directory that holds "
            "one (a run writes it once its steps tell the terms apart)"
        ) from None
    return CostModel.parse(text, str(file))


def heaviest_share(allotment: Allotment, outputs: Indices) -> tuple[int, int, int]:
    """Return the slots, summed longest walks and cells of the rank with the largest load: all others wait for it.

    `outputs` `[n]`: the output frames of the clips by position in the batch.
    """
    return share_counts(allotment, int(allotment.loads.argmax()), outputs)


def share_counts(allotment: Allotment, rank: int, outputs: Indices) -> tuple[int, int, int]:
    """Return the slots, summed longest walks and cells of a rank."""
    # A cell without clips computes one silent output frame.
    walks = sum(int(outputs[cell].max(initial=1)) for cell in allotment.cells(rank))
    return int(allotment.costs[allotment.share(rank)].sum()), walks, allotment.cells_per_rank


class CostFitter:
    """Collects the steps of an attempt, the last few thousand of them, and fits a cost model to them."""

    def __init__(self, capacity: int = _CAPACITY, warm_up: int = _WARM_UP) -> None:
        self._samples: Floats = np.empty((capacity, 4))
        self._warm_up = warm_up
        self._added = 0

    def add(self, share_slots: int, share_walks: int, cells: int, seconds: float) -> None:
        """Note a step: what the rank with the largest load computed, and the seconds without the wait for data."""
        self._added += 1
        place = self._added - 1 - self._warm_up
        if place >= 0:
            self._samples[place % len(self._samples)] = share_slots, share_walks, cells, seconds

    def fit(self) -> CostModel | None:
        """Fit by non-negative least squares of the relative error, outliers left out.

        None while the samples cannot tell: too few, too much alike, or too noisy for any of the terms.
        """
        count = min(max(0, self._added - self._warm_up), len(self._samples))
        return fit_cost_model(self._samples[:count])


def fit_cost_model(samples: Floats) -> CostModel | None:
    """Fit rows of (slots, walks, cells, seconds) `[n, 4]`; None if they cannot tell.

    A step with a validation, a checkpoint or a noisy neighbour in it lies far from the others: what is beyond 3 median
    absolute deviations is left out, again and again until the fit stays. A third must remain: on a machine that is half
    as fast for half of the time the model is that of one of its two speeds.
    """
    counts, seconds = samples[:, :3], samples[:, 3]
    usable = np.isfinite(samples).all(axis=1) & (seconds > 0)
    counts, seconds = counts[usable], seconds[usable]
    if len(seconds) < _FEWEST_SAMPLES:
        return None
    kept = np.ones(len(seconds), dtype=bool)
    # At first relative to what was measured: a step that took too long then has an error of 1 at most, and little say.
    scale = seconds
    for _ in range(_ROUNDS):
        coefficients = _least_squares(counts[kept] / scale[kept, None], seconds[kept] / scale[kept])
        predicted = counts @ coefficients
        if predicted.min() <= 0:
            return None
        error = seconds / predicted - 1.0
        off = np.abs(error - np.median(error[kept]))
        inside = off <= max(_OUTLIER_MADS * _TO_DEVIATION * float(np.median(off[kept])), _TIMER_NOISE)
        settled, kept, scale = bool((inside == kept).all()) and scale is not seconds, inside, predicted
        if settled:
            break
    if kept.sum() < max(_FEWEST_SAMPLES, len(seconds) // 3):
        return None
    residual = float(np.sqrt((error[kept] ** 2).mean()))
    if not _can_tell(counts[kept] / predicted[kept, None], max(residual, _TIMER_NOISE)):
        return None
    per_slot, per_walk, per_cell = coefficients.tolist()
    return CostModel(
        per_slot=per_slot, per_walk=per_walk, per_cell=per_cell, samples=int(kept.sum()), residual=residual
    )


def _least_squares(rows: Floats, target: Floats) -> Floats:
    """Solve for coefficients of at least 0, `[n, 3]` and `[n]` to `[3]`: the best of all sets that may be above 0."""
    # Columns of like size, or slots in the thousands would drown the cells.
    size = np.maximum(rows.mean(axis=0), np.finfo(float).tiny)
    gram, moment = (rows / size).T @ (rows / size), (rows / size).T @ target
    best, least = np.zeros(3), 0.0
    for chosen in range(1, 8):
        active = np.flatnonzero([chosen >> bit & 1 for bit in range(3)])
        solution = np.zeros(3)
        solution[active] = np.linalg.lstsq(gram[np.ix_(active, active)], moment[active], rcond=None)[0]
        # The squared error, but for the target's own square.
        squares = float(solution @ gram @ solution - 2.0 * solution @ moment)
        if solution.min() >= 0 and squares < least:
            best, least = solution, squares
    return np.asarray(best / size)


def _can_tell(rows: Floats, noise: float) -> bool:
    """Tell whether each term's share of a step is known well enough, by its standard error; `noise` is relative.

    `rows` `[n, 3]` are the counts of samples over their predicted seconds.
    """
    size = rows.mean(axis=0)
    present = size > 0
    scaled = rows[:, present] / size[present]
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    if values[0] <= 1e-12 * values[-1]:
        return False
    variances = (vectors**2 / values).sum(axis=1)
    # Scaled so, a coefficient is the mean share of its term.
    return bool(noise * math.sqrt(variances.max()) <= _LARGEST_ERROR)
