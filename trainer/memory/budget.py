"""The budget of a micro-batch: lowered by all ranks when one of them runs out of memory, and creeping back up."""

from __future__ import annotations

_LOWERED = 0.75
_RAISED = 1.05
_CALM_STEPS = 100
"""Steps without a shortage after which the budget is raised again."""


class FrameBudget:
    """The largest number of frames in a cell of several clips, the same on all ranks.

    `start` is what the run began with and never exceeds; `floor` the longest clip, which gets a cell to itself anyway.
    """

    def __init__(self, start: int, floor: int) -> None:
        self.value = self.start = start
        self.floor = min(floor, start)
        self._calm = 0

    def lower(self, used: int, shortages: int) -> None:
        """Note a step whose largest cell had at most `used` frames, and in which memory ran out so many times."""
        # Cells that had to be halved again and again say that much less would have fitted.
        depth = shortages.bit_length()
        self.value = max(self.floor, int(min(self.value, used) * _LOWERED**depth))
        self._calm = 0

    def rise(self) -> bool:
        """Note a step in which it did not; tell whether the budget rose."""
        if self.value == self.start:
            return False
        self._calm += 1
        if self._calm < _CALM_STEPS:
            return False
        self.value, self._calm = min(self.start, int(self.value * _RAISED) + 1), 0
        return True
