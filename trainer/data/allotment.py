"""The allotment: how the ranks share one global batch.

A pure function of (costs, world size, memory budget): `world_size x k` cells of near-equal cost, every rank the same
`k`. The model computes on clips laid end to end, so that a cell costs the sum of its clips' slots whatever their
lengths, and clips may be combined freely for balance. What does depend on the longest clip, a recurrent layer's walk
along it, may enter as a second term.

Every decision is made in integers and every tie broken by position, so that all ranks, on whatever machine, compute
the same allotment without asking.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS_FROM = 256
"""World size above which clips are dealt in rounds: one sort a round beats one heap operation a clip."""
_MOVABLE = 32
"""Clips of a rank that may be swapped, its shortest: finer differences than theirs gain nothing."""
_CANDIDATES = 1 << 15
"""Swaps weighed at once; more pairs a round take longer than they save rounds."""
_REFINEMENTS = 64
"""Rounds of swaps at most: the last ones gain next to nothing."""


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """Cells of one global batch of n clips on W ranks, cut when asked for.

    `clips` `[n]`: positions in the batch, rank after rank, each rank's longest first. `starts` `[W + 1]`: where each
    rank's begin. `costs` `[n]`: of the clips by position. `loads` `[W]`: what each rank pays, the sum of its clips'
    costs and the largest of their sequential terms, where such were given.
    """

    clips: Indices
    starts: Indices
    costs: Indices
    loads: Indices
    cells_per_rank: int
    """Micro-batches of every rank."""
    budget: int
    """The largest cost of a cell of several clips."""

    @property
    def world_size(self) -> int:
        """Count the ranks."""
        return len(self.loads)

    @property
    def imbalance(self) -> float:
        """Return the largest rank's load over the mean of all ranks."""
        return int(self.loads.max()) * self.world_size / max(1, int(self.loads.sum()))

    def share(self, rank: int) -> Indices:
        """Return the positions in the batch of a rank's clips, longest first, possibly none."""
        return self.clips[self.starts[rank] : self.starts[rank + 1]]

    def cells(self, rank: int) -> list[Indices]:
        """Cut a rank's clips into `cells_per_rank` cells of positions in the batch, trailing ones possibly empty."""
        share = self.share(rank)
        if self.cells_per_rank == 1:
            return [share]
        return np.split(share, _cut_evenly(self.costs[share], self.cells_per_rank, self.budget))


def allot(costs: Indices, *, world_size: int, budget: int, sequential: Indices | None = None) -> Allotment:
    """Share clips of the given `costs` `[n]` among `world_size` ranks in cells whose costs are at most `budget`.

    `sequential` `[n]`, in the unit of the costs, is what a rank pays in addition for the longest of its clips; the
    budget, a matter of memory, knows nothing of it. A clip that alone exceeds the budget gets a cell for itself. Ties
    are broken by position, so that every rank computes the same allotment without asking.
    """
    costs = np.asarray(costs, dtype=np.int64)
    order = _longest_first(costs)
    sorted_costs = costs[order]
    walks = None if sequential is None else np.asarray(sequential, dtype=np.int64)[order]
    ranks = _deal(sorted_costs, walks, world_size)
    _refine(ranks, sorted_costs, walks, world_size)
    # Stable: a rank's clips stay longest first.
    by_rank = _sort_small(ranks, world_size)
    starts = np.searchsorted(ranks[by_rank], np.arange(world_size + 1))
    sums = np.concatenate([[0], np.cumsum(sorted_costs[by_rank])])
    loads = sums[starts[1:]] - sums[starts[:-1]]
    cells_per_rank = max(1, _cells_needed(sums, starts[:-1], starts[1:], budget))
    if walks is not None:
        np.add(loads, _largest(ranks, walks, world_size), out=loads)
    return Allotment(
        clips=order[by_rank],
        starts=starts,
        costs=costs,
        loads=loads,
        cells_per_rank=cells_per_rank,
        budget=budget,
    )


def _longest_first(costs: Indices) -> Indices:
    """Sort clips by cost, `[n]`, equals in the order of their positions."""
    largest = int(costs.max(initial=0))
    return _sort_small(largest - costs, largest + 1)


def _sort_small(keys: Indices, bound: int) -> Indices:
    """Argsort keys from 0 to below `bound`, `[n]`, stably; two bytes each are sorted by radix, in a fraction."""
    return np.argsort(keys.astype(np.uint16) if bound <= 1 << 16 else keys, kind="stable")


def _largest(ranks: Indices, walks: Indices, world_size: int) -> Indices:
    """Return the largest sequential term on each rank, `[W]`."""
    largest = np.zeros(world_size, dtype=np.int64)
    np.maximum.at(largest, ranks, walks)
    return largest


def _add_up(ranks: Indices, costs: Indices, world_size: int) -> Indices:
    """Return the cost of each rank's clips, `[W]`."""
    sums = np.zeros(world_size, dtype=np.int64)
    np.add.at(sums, ranks, costs)
    return sums


def _deal(costs: Indices, walks: Indices | None, world_size: int) -> Indices:
    """Give clips, longest first, to the least loaded ranks (Graham 1969): the rank of each, `[n]`.

    In large worlds a round at a time: the next quarter of a world's clips goes to the least loaded quarter of ranks.
    """
    ranks = np.empty(len(costs), dtype=np.int64)
    sums, longest = np.zeros(world_size, dtype=np.int64), np.zeros(world_size, dtype=np.int64)
    dealt, quarter = 0, -(-world_size // 4)
    numbers = np.arange(world_size)
    while world_size > _ROUNDS_FROM and dealt < len(costs):
        # Distinct keys: the order of ranks with equal loads does not hang on the sorting routine.
        keys = np.sort((sums + longest) * world_size + numbers)[: min(quarter, len(costs) - dealt)]
        # A rank above this would have to wait until others, given one clip, are given another.
        limit = (int(keys[0]) // world_size + int(costs[dealt]) + 1) * world_size
        keys = keys[keys < limit]
        if len(keys) < min(quarter, len(costs) - dealt) // 16:
            # Few ranks take many clips: rounds would be as many as clips.
            break
        takers = keys % world_size
        clips = slice(dealt, dealt + len(takers))
        ranks[clips] = takers
        sums[takers] += costs[clips]
        if walks is not None:
            longest[takers] = np.maximum(longest[takers], walks[clips])
        dealt += len(takers)
    if dealt < len(costs):
        ranks[dealt:] = _deal_singly(costs[dealt:], None if walks is None else walks[dealt:], sums, longest)
    return ranks


def _deal_singly(costs: Indices, walks: Indices | None, sums: Indices, longest: Indices) -> list[int]:
    """Give clips one by one to ranks that hold `sums` and largest sequential terms `longest`, `[W]` each."""
    heap = [(load, rank) for rank, load in enumerate((sums + longest).tolist())]
    heapq.heapify(heap)
    takers, walked = [], longest.tolist()
    for cost, walk in zip(costs.tolist(), (costs * 0 if walks is None else walks).tolist(), strict=True):
        load, rank = heap[0]
        takers.append(rank)
        if walk > walked[rank]:
            load, walked[rank] = load + walk - walked[rank], walk
        heapq.heapreplace(heap, (load + cost, rank))
    return takers


def _refine(ranks: Indices, costs: Indices, walks: Indices | None, world_size: int) -> None:
    """Mend `ranks` `[n]` in place: the fullest ranks swap a clip with the emptiest while that lowers the maximum.

    Each of the P fullest ranks is paired with one of the P emptiest; all swaps of one clip with one, or with none, are
    weighed at once, `[P, C, C]`, and each pair makes its best. Where that does not help the fullest rank, it looks at
    others too, and then at swaps of two clips with two. Costs and ranks are those of clips longest first.
    """
    if world_size == 1:
        return
    table = _movable(ranks, world_size)
    # Half the width, where it does: every operation on [P, C, C] takes half as long.
    number: type[np.signedinteger] = np.int32 if 4 * int(costs.sum()) < 1 << 31 else np.int64
    # Clip n stands for none: it costs nothing and fills the table.
    costs, sums = np.append(costs, 0).astype(number), _add_up(ranks, costs, world_size).astype(number)
    walks = None if walks is None else np.append(walks, 0)
    fixed = np.zeros(world_size, dtype=np.int64)
    if walks is not None:
        held = np.ones(len(costs), dtype=bool)
        held[table] = False
        fixed = _largest(ranks[held[:-1]], walks[:-1][held[:-1]], world_size)
    columns = np.arange(table.shape[1])
    singles, couples = columns[:, None], np.stack(np.triu_indices(len(columns), 1), axis=1)
    loads = sums.astype(np.int64) if walks is None else sums + np.maximum(fixed, walks[table].max(axis=1))
    stage = 0
    for _ in range(min(_REFINEMENTS, max(8, _REFINEMENTS * 1024 // world_size))):
        by_load = np.sort(loads * world_size + np.arange(world_size)) % world_size
        groups = couples if stage == 2 else singles
        weighed = max(1, _CANDIDATES // len(groups) ** 2)
        empty = by_load[: min(weighed, world_size // 2 if stage == 0 else world_size - 1)]
        full = by_load[: -len(empty) - 1 : -1] if stage == 0 else np.full(len(empty), by_load[-1])
        give, take = table[full][:, groups], table[empty][:, groups]
        moved = costs[give].sum(axis=2, dtype=number)[:, :, None] - costs[take].sum(axis=2, dtype=number)[:, None, :]
        if walks is None:
            # The better, the nearer to half the difference of the two; nothing gained below is nothing gained.
            before = loads[full] - loads[empty]
            after = np.abs(2 * moved - before.astype(number)[:, None, None])
        else:
            before = np.maximum(loads[full], loads[empty])
            full_longest = np.maximum(
                _without(walks[table[full]], fixed[full], groups)[:, :, None], walks[take].max(axis=2)[:, None, :]
            )
            empty_longest = np.maximum(
                _without(walks[table[empty]], fixed[empty], groups)[:, None, :], walks[give].max(axis=2)[:, :, None]
            )
            after = np.maximum(
                sums[full][:, None, None] - moved + full_longest, sums[empty][:, None, None] + moved + empty_longest
            )
        after = after.reshape(len(full), -1)
        choice = after.argmin(axis=1)
        reached = after[np.arange(len(full)), choice]
        better = np.flatnonzero(reached < before)
        if stage > 0 and len(better):
            # What the fullest rank would reach, with each partner.
            largest = np.maximum(loads[full], loads[empty]) * 2 - before + reached if walks is None else reached
            better = better[[largest[better].argmin()]]
        # Pairs are in the order of their loads.
        stage = 0 if len(better) and (stage > 0 or better[0] == 0) else stage + 1
        if stage > 2:
            break
        i, j = np.divmod(choice[better], len(groups))
        full, empty, change = full[better], empty[better], moved.reshape(len(moved), -1)[better, choice[better]]
        given, taken = (full[:, None], groups[i]), (empty[:, None], groups[j])
        table[given], table[taken] = table[taken], table[given]
        sums[full] -= change
        sums[empty] += change
        loads = sums.astype(np.int64) if walks is None else sums + np.maximum(fixed, walks[table].max(axis=1))
    rows, slots = np.nonzero(table < len(ranks))
    ranks[table[rows, slots]] = rows


def _movable(ranks: Indices, world_size: int) -> Indices:
    """List each rank's shortest clips, `[W, C]`, filled up with n, the clip that is none, at least one each."""
    by_rank = _sort_small(ranks, world_size)
    owners = ranks[by_rank]
    ends = np.searchsorted(owners, np.arange(world_size), side="right")
    from_end = ends[owners] - 1 - np.arange(len(ranks))
    width = min(int(from_end.max(initial=0)) + 2, _MOVABLE)
    table = np.full((world_size, width), len(ranks), dtype=np.int64)
    kept = from_end < width - 1
    table[owners[kept], from_end[kept]] = by_rank[kept]
    return table


def _without(walks: Indices, fixed: Indices, groups: Indices) -> Indices:
    """Return the largest sequential term of ranks without each group of clips, `[P, G]`; `fixed` `[P]` always stays.

    `walks` `[P, C]`, `groups` `[G, S]`: the columns of each group.
    """
    stays = np.ones((len(groups), walks.shape[1]), dtype=bool)
    stays[np.arange(len(groups))[:, None], groups] = False
    rest = np.where(stays, walks[:, None, :], 0).max(axis=2)
    return np.maximum(rest, fixed[:, None])


def _cells_needed(sums: Indices, starts: Indices, ends: Indices, budget: int) -> int:
    """Count the cells of at most `budget` that the fullest rank's clips fill, one after the other.

    `sums` `[n + 1]` are the costs before each clip and in all; `starts` and `ends` `[W]` bound each rank's clips.
    """
    needed = 0
    # All ranks fill one cell at a time.
    while len(waiting := np.flatnonzero(starts < ends)):
        starts, ends = starts[waiting], ends[waiting]
        reach = np.searchsorted(sums, sums[starts] + budget, side="right") - 1
        starts = np.maximum(reach, starts + 1)
        needed += 1
    return needed


def _cut_evenly(costs: Indices, k: int, budget: int) -> list[int]:
    """Cut clips, in this order, into `k` runs of least largest cost: the `k - 1` cuts; trailing runs empty."""
    sums = np.concatenate([[0], np.cumsum(costs)])
    # A clip beyond the budget has a run to itself, and must not raise the limit of the others.
    low, high = min(int(costs.max(initial=0)), budget), min(int(costs.sum()), budget)
    first, last = np.array([0]), np.array([len(costs)])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _cells_needed(sums, first, last, middle) <= k else (middle + 1, high)
    cuts: list[int] = []
    start = 0
    while len(cuts) < k - 1:
        reach = int(np.searchsorted(sums, sums[start] + low, side="right")) - 1
        start = min(max(reach, start + 1), len(costs))
        cuts.append(start)
    return cuts
