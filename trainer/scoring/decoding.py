"""From frame scores to glosses: the best path (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
