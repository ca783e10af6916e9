"""Clip lengths with the moments of PHOENIX-2014's training split, from a few fitted numbers.

Batching, padding and CTC feasibility are decided by how long clips are, and by how length and glosses hang
together. This generator stands in for the real table wherever that must not be shipped: benchmarks, tests,
the synthetic corpus.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MIN_FRAMES, MAX_FRAMES = 16, 299
MIN_GLOSSES, MAX_GLOSSES = 2, 28
ADJACENT_REPEAT_SHARE = 0.0756
"""Share of neighbouring gloss pairs that repeat a gloss, in PHOENIX-2014's training annotations."""
FEASIBLE_STRIDE = 4
"""Every drawn clip is feasible for CTC at this total temporal stride; so it is at any smaller one."""

# Fitted to the 5,672 training clips. Glosses follow a shifted gamma; frames given glosses follow another
# around a slightly concave mean (long sentences are signed faster) with a spread that does not depend on it.
_GLOSS_MEAN, _GLOSS_SD, _GLOSS_SKEW = 11.5, 3.59, 0.49
_FRAMES_AT_MEAN, _FRAMES_PER_GLOSS, _FRAMES_BEND = 143.12, 9.712, -0.1759
_FRAMES_SD, _FRAMES_SKEW = 26.2, 0.46
# A clip repeats glosses more or less often than the next one does: beta-distributed around the share.
_REPEAT_CONCENTRATION = 22.0


def _gamma_mass(support: Ints, mean: float, sd: float, skew: float) -> Floats:
    """Return the mass [len(support)] of a shifted gamma (Pearson III), normalised over `support`."""
    shape = 4.0 / skew**2
    scaled = np.maximum((support - mean) / sd * np.sqrt(shape) + shape, 1e-9)
    log_density = (shape - 1.0) * np.log(scaled) - scaled
    mass = np.exp(log_density - log_density.max())
    return np.asarray(mass / mass.sum(), dtype=np.float64)


@lru_cache(maxsize=1)
def _tables() -> tuple[Floats, Floats]:
    """Return the cumulative mass of glosses [27] and of frames given glosses [27, 284]."""
    glosses = np.arange(MIN_GLOSSES, MAX_GLOSSES + 1, dtype=np.int64)
    frames = np.arange(MIN_FRAMES, MAX_FRAMES + 1, dtype=np.int64)
    away = glosses - _GLOSS_MEAN
    means = _FRAMES_AT_MEAN + _FRAMES_PER_GLOSS * away + _FRAMES_BEND * away**2
    rows = []
    for num_glosses, mean in zip(glosses, means, strict=True):
        mass = _gamma_mass(frames, float(mean), _FRAMES_SD, _FRAMES_SKEW)
        mass[_output_frames(frames) < num_glosses] = 0.0
        rows.append(np.cumsum(mass / mass.sum()))
    return np.cumsum(_gamma_mass(glosses, _GLOSS_MEAN, _GLOSS_SD, _GLOSS_SKEW)), np.stack(rows)


def _output_frames(num_frames: Ints) -> Ints:
    return -(-num_frames // FEASIBLE_STRIDE)


def _quantile(cumulative: Floats, uniforms: Floats) -> Ints:
    """Return the index of each uniform [N] in a cumulative mass [K]."""
    # The last entry may round to just under 1; leaving it out keeps the index in range.
    return np.searchsorted(cumulative[:-1], uniforms, side="right").astype(np.int64)


def draw_phoenix_lengths(num_clips: int, seed: int) -> tuple[Ints, Ints]:
    """Draw (num_frames int64 [N], num_glosses int64 [N]) as PHOENIX-2014's training split has them.

    Frames at 25 per second: mean 140.9, standard deviation 42.8, range 16–299. Glosses: mean 11.5, standard
    deviation 3.6, range 2–28. Correlation 0.787. `ceil(num_frames / 4) >= num_glosses` holds for every clip.
    The first n clips of a longer draw from the same seed are the draw of n clips.
    Fitted to the training annotations of RWTH-PHOENIX-Weather 2014 (Koller et al., 2015).
    """
    gloss_table, frame_table = _tables()
    uniforms = np.random.default_rng(seed).random((num_clips, 2))
    gloss_index = _quantile(gloss_table, uniforms[:, 0])
    frame_index = np.zeros(num_clips, dtype=np.int64)
    for index, frames_given_glosses in enumerate(frame_table):
        mine = gloss_index == index
        frame_index[mine] = _quantile(frames_given_glosses, uniforms[mine, 1])
    return frame_index + MIN_FRAMES, gloss_index + MIN_GLOSSES


def draw_adjacent_repeats(num_frames: Ints, num_glosses: Ints, seed: int) -> Ints:
    """Draw how many glosses of each clip repeat their predecessor, int64 [N].

    7.6 % of neighbouring pairs, unevenly spread over clips (a beta-binomial); never so many that the clip
    turns infeasible: `ceil(num_frames / 4) >= num_glosses + repeats` wherever it held without repeats.
    """
    rng = np.random.default_rng(seed)
    shares = rng.beta(
        ADJACENT_REPEAT_SHARE * _REPEAT_CONCENTRATION,
        (1.0 - ADJACENT_REPEAT_SHARE) * _REPEAT_CONCENTRATION,
        size=len(num_glosses),
    )
    repeats = rng.binomial(num_glosses - 1, shares)
    room = np.maximum(_output_frames(num_frames) - num_glosses, 0)
    return np.minimum(repeats, room).astype(np.int64)
