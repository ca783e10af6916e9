"""From frame scores to glosses and their times: the best path (Graves et al. 2006) and alignments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """One decoded class: where its run of output frames starts and how long it is."""

    label: int
    start: int
    frames: int


def best_path(frame_labels: npt.NDArray[np.int64], blank: int = 0) -> Iterator[Emission]:
    """Collapse the best class of each frame `[T]`: repeats merge, blanks go."""
    if not len(frame_labels):
        return
    starts = np.flatnonzero(np.diff(frame_labels, prepend=frame_labels[0] - 1))
    for start, end in zip(starts, [*starts[1:], len(frame_labels)], strict=True):
        if frame_labels[start] != blank:
            yield Emission(label=int(frame_labels[start]), start=int(start), frames=int(end - start))


def align(log_probs: npt.NDArray[np.floating], labels: Sequence[int], blank: int = 0) -> list[Emission]:
    """Place classes on the frames `[T, V]` where their most probable alignment has them (Viterbi).

    Raises ValueError where T frames cannot spell them, or have probability 0 of doing so.
    """
    num_frames = len(log_probs)
    if num_frames < len(labels) + sum(one == other for one, other in pairwise(labels)):
        raise ValueError(f"{num_frames} frames cannot spell {len(labels)} classes")
    if not labels:
        return []
    # A blank before, between and after the classes; one between different classes may be passed over.
    states = np.full(2 * len(labels) + 1, blank)
    states[1::2] = labels
    may_skip = np.zeros(len(states), dtype=bool)
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    scores = np.full(len(states), -np.inf)
    scores[:2] = np.asarray(log_probs[0], dtype=np.float64)[states[:2]]
    steps = np.zeros((num_frames, len(states)), dtype=np.int64)
    for time in range(1, num_frames):
        options = np.full((3, len(states)), -np.inf)
        options[0] = scores
        options[1, 1:] = scores[:-1]
        options[2, 2:] = np.where(may_skip[2:], scores[:-2], -np.inf)
        steps[time] = options.argmax(axis=0)
        scores = options.max(axis=0) + log_probs[time][states]
    if scores[-2:].max() == -np.inf:
        raise ValueError(f"the classes {list(labels)} have probability 0")
    path = np.empty(num_frames, dtype=np.int64)
    path[-1] = len(states) - 1 if scores[-1] >= scores[-2] else len(states) - 2
    for time in range(num_frames - 1, 0, -1):
        path[time - 1] = path[time] - steps[time, path[time]]
    emissions = []
    for place, label in enumerate(labels):
        frames = np.flatnonzero(path == 2 * place + 1)
        emissions.append(Emission(label=label, start=int(frames[0]), frames=len(frames)))
    return emissions


def confidence(log_probs: npt.NDArray[np.floating], emission: Emission) -> float:
    """Return the mean posterior of a class over its frames, 0..1; `log_probs` `[T, V]`."""
    frames = slice(emission.start, emission.start + emission.frames)
    return float(np.exp(np.asarray(log_probs[frames, emission.label], dtype=np.float64)).mean())
