"""The allotment: how the ranks share one global batch.

A pure function of (frames, world size, memory budget): `world_size x k` cells of near-equal cost, every rank the
same `k`. The model computes on clips laid end to end, so that a cell costs the sum of its clips' slots whatever
their lengths, and clips may be combined freely for balance.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """Cells of one global batch: `cells[rank][k]` holds positions in the batch, possibly none."""

    cells: list[list[Indices]]
    costs: Indices

    @property
    def cells_per_rank(self) -> int:
        """Count the micro-batches of every rank."""
        return len(self.cells[0])

    @property
    def imbalance(self) -> float:
        """Return the largest rank's cost over the mean of all ranks."""
        loads = [sum(int(self.costs[cell].sum()) for cell in rank) for rank in self.cells]
        return max(loads) * len(loads) / max(1, sum(loads))


def allot(costs: Indices, *, world_size: int, budget: int) -> Allotment:
    """Share clips of the given `costs` `[n]` (frames) among `world_size` ranks in cells of at most `budget`.

    A clip that alone exceeds the budget gets a cell for itself. Ties are broken by position, so that every rank
    computes the same allotment without asking.
    """
    costs = np.asarray(costs, dtype=np.int64)
    shares = _balance(costs, world_size)
    # One cell a rank is the usual case, and thousands of ranks should not search for cuts they do not need.
    k = max((_cells_needed(costs[share], budget) for share in shares if costs[share].sum() > budget), default=1)
    if k == 1:
        return Allotment(cells=[[share] for share in shares], costs=costs)
    cells = [[share[cut] for cut in _cut_evenly(costs[share], k, budget)] for share in shares]
    return Allotment(cells=cells, costs=costs)


def _balance(costs: Indices, world_size: int) -> list[Indices]:
    """Spread clips over ranks: longest first to the least loaded rank (Graham 1969), then refined by swaps."""
    order = np.argsort(-costs, kind="stable")
    heap = [(0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for clip in order:
        load, rank = heapq.heappop(heap)
        shares[rank].append(int(clip))
        heapq.heappush(heap, (load + int(costs[clip]), rank))
    loads = np.zeros(world_size, dtype=np.int64)
    for load, rank in heap:
        loads[rank] = load
    _refine(costs, shares, loads)
    return [np.array(sorted(share, key=lambda clip: (-costs[clip], clip)), dtype=np.int64) for share in shares]


def _refine(costs: Indices, shares: list[list[int]], loads: Indices) -> None:
    """Swap clips of the most loaded rank with others' while that lowers the larger of the two loads."""
    for _ in range(4 * len(shares)):
        worst = int(np.argmax(loads))
        mine = np.array(shares[worst], dtype=np.int64)
        best: tuple[int, int, int, int] | None = None
        # The least loaded ranks have the most room; a few of them are enough, whatever the world size.
        for other in np.argsort(loads, kind="stable")[:8]:
            theirs = np.array(shares[other], dtype=np.int64)
            if other == worst or not len(theirs) or not len(mine):
                continue
            moved = costs[mine][:, None] - costs[theirs][None, :]
            larger = np.maximum(loads[worst] - moved, loads[other] + moved)
            row, column = divmod(int(np.argmin(larger)), len(theirs))
            if larger[row, column] < loads[worst] and (best is None or larger[row, column] < best[0]):
                best = (int(larger[row, column]), int(other), row, column)
        if best is None:
            return
        _, partner, i, j = best
        delta = costs[shares[worst][i]] - costs[shares[partner][j]]
        shares[worst][i], shares[partner][j] = shares[partner][j], shares[worst][i]
        loads[worst] -= delta
        loads[partner] += delta


def _cells_needed(costs: Indices, budget: int) -> int:
    """Count the cells of at most `budget` that clips in this order fill, one after the other."""
    needed, load = 0, budget + 1
    for cost in costs.tolist():
        if load + cost > budget:
            needed, load = needed + 1, 0
        load += cost
    return needed


def _cut_evenly(costs: Indices, k: int, budget: int) -> list[slice]:
    """Cut clips, in this order, into `k` runs whose largest cost is least; trailing runs may be empty."""
    # A clip beyond the budget has a run to itself, and must not raise the limit of the others.
    low, high = min(int(costs.max(initial=0)), budget), min(int(costs.sum()), budget)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _cells_needed(costs, middle) <= k else (middle + 1, high)
    cuts, start, load = [], 0, 0
    for i, cost in enumerate(costs.tolist()):
        if i > start and load + cost > low:
            cuts.append(slice(start, i))
            start, load = i, 0
        load += cost
    cuts.append(slice(start, len(costs)))
    return cuts + [slice(len(costs), len(costs))] * (k - len(cuts))
