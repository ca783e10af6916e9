"""The allotment: every clip on one rank, equal numbers of cells, memory kept to, and loads that hardly differ."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.allotment import Allotment, allot
from trainer.data.lengths import draw_phoenix_lengths
from trainer.layout import slot_frames

REAL_LENGTHS = Path(__file__).parents[3] / "shared" / "data" / "phoenix2014_lengths.csv"
STRIDE, CLIPS_PER_RANK = 4, 8

costs_lists = st.lists(st.integers(min_value=1, max_value=400), min_size=1, max_size=150)
worlds = st.integers(min_value=1, max_value=64)
budgets = st.integers(min_value=1, max_value=3000)
thorough = settings(max_examples=150, deadline=None)


def make(costs: list[int], world_size: int, budget: int) -> Allotment:
    return allot(np.array(costs), world_size=world_size, budget=budget)


def cells_of(allotment: Allotment) -> list[list[np.ndarray]]:
    return [allotment.cells(rank) for rank in range(allotment.world_size)]


def loads_of(allotment: Allotment) -> np.ndarray:
    return np.array([sum(int(allotment.costs[cell].sum()) for cell in rank) for rank in cells_of(allotment)])


@thorough
@given(costs=costs_lists, world_size=worlds, budget=budgets)
def test_every_clip_is_in_exactly_one_cell_and_every_rank_has_as_many_cells(
    costs: list[int], world_size: int, budget: int
) -> None:
    allotment = make(costs, world_size, budget)
    clips = np.concatenate([cell for rank in cells_of(allotment) for cell in rank])
    assert sorted(clips.tolist()) == list(range(len(costs)))
    assert allotment.world_size == world_size
    assert {len(rank) for rank in cells_of(allotment)} == {allotment.cells_per_rank}
    assert allotment.cells_per_rank >= 1


@thorough
@given(costs=costs_lists, world_size=worlds, budget=budgets)
# One clip beyond the budget must not lend its size to the cells of the others.
@example(costs=[500, 90, 90, 90], world_size=1, budget=100)
def test_no_cell_exceeds_the_budget_but_that_of_a_single_clip(costs: list[int], world_size: int, budget: int) -> None:
    allotment = make(costs, world_size, budget)
    for cell in (cell for rank in cells_of(allotment) for cell in rank):
        assert len(cell) <= 1 or allotment.costs[cell].sum() <= budget


@thorough
@given(costs=costs_lists, world_size=worlds, budget=budgets)
def test_the_most_loaded_rank_is_at_most_one_clip_above_the_mean(
    costs: list[int], world_size: int, budget: int
) -> None:
    allotment = make(costs, world_size, budget)
    loads = loads_of(allotment)
    assert loads.max() <= loads.mean() + max(costs)
    if len(costs) <= world_size:
        assert loads.max() == max(costs)
    assert allotment.imbalance == pytest.approx(loads.max() / loads.mean())


@thorough
@given(costs=costs_lists, world_size=worlds, budget=budgets)
def test_all_ranks_compute_the_same_allotment(costs: list[int], world_size: int, budget: int) -> None:
    one_rank, other_rank = make(costs, world_size, budget), make(costs, world_size, budget)
    for one, other in zip(cells_of(one_rank), cells_of(other_rank), strict=True):
        assert [cell.tolist() for cell in one] == [cell.tolist() for cell in other]


@thorough
@given(costs=costs_lists, world_size=worlds, data=st.data())
def test_no_rank_uses_more_cells_than_the_fullest_one_needs(
    costs: list[int], world_size: int, data: st.DataObject
) -> None:
    budget = data.draw(st.integers(min_value=max(costs), max_value=max(costs) * 4))
    allotment = make(costs, world_size, budget)
    # Two neighbouring cells of a greedy packing exceed the budget together, so that half of it is always used.
    needed = np.ceil(2 * loads_of(allotment).max() / budget)
    assert allotment.cells_per_rank <= max(1, needed)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_with_room_for_everything_each_rank_has_one_cell(world_size: int) -> None:
    costs = list(range(20, 90))
    assert make(costs, world_size, sum(costs)).cells_per_rank == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_with_a_budget_of_one_frame_every_clip_has_its_own_cell(world_size: int) -> None:
    allotment = make([30] * 12, world_size, 1)
    assert allotment.cells_per_rank == 12 // world_size
    assert {len(cell) for rank in cells_of(allotment) for cell in rank} == {1}


def test_more_ranks_than_clips_leaves_idle_cells_and_no_clip_behind() -> None:
    allotment = make([50, 60, 70], 8, 1000)
    assert sorted(len(rank[0]) for rank in cells_of(allotment)) == [0, 0, 0, 0, 0, 1, 1, 1]
    assert allotment.cells_per_rank == 1


def test_the_cells_of_a_rank_are_of_near_equal_cost() -> None:
    # Cut greedily, the last cell would be left with a single clip.
    allotment = make([100] * 9, 1, 800)
    assert [len(cell) for cell in allotment.cells(0)] == [5, 4]


def test_swaps_mend_what_longest_first_leaves_uneven() -> None:
    # Longest first alone gives 17 and 13.
    assert loads_of(make([8, 7, 5, 5, 5], 2, 100)).tolist() == [15, 15]


# Against the real distribution of lengths.


@pytest.fixture(scope="module", params=["real", "drawn"])
def lengths(request: pytest.FixtureRequest) -> np.ndarray:
    if request.param == "drawn":
        return draw_phoenix_lengths(5672, seed=0)[0]
    if not REAL_LENGTHS.exists():
        pytest.skip("the real length table lies outside the repository and is not here")
    with REAL_LENGTHS.open(newline="") as file:
        return np.array([int(row["num_frames"]) for row in csv.DictReader(file) if row["split"] == "train"])


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_a_step_takes_at_most_six_percent_longer_than_perfectly_shared_work(
    lengths: np.ndarray, world_size: int
) -> None:
    size = CLIPS_PER_RANK * world_size
    budget = CLIPS_PER_RANK * int(slot_frames(lengths, STRIDE).max())
    order = np.random.default_rng(world_size).permutation(len(lengths))
    slowest = ideal = 0.0
    for start in range(0, len(order) - size + 1, size):
        frames = lengths[order[start : start + size]]
        allotment = allot(slot_frames(frames, STRIDE), world_size=world_size, budget=budget)
        assert allotment.cells_per_rank == 1
        slowest += loads_of(allotment).max()
        ideal += frames.sum() / world_size
    assert slowest / ideal <= 1.06


@thorough
@given(costs=costs_lists, world_size=worlds, data=st.data())
def test_the_loads_are_those_of_the_cells_with_the_longest_sequential_term_added(
    costs: list[int], world_size: int, data: st.DataObject
) -> None:
    walks = np.array(data.draw(st.lists(st.integers(0, 400), min_size=len(costs), max_size=len(costs))))
    allotment = allot(np.array(costs), world_size=world_size, budget=3000, sequential=walks)
    shares = [allotment.share(rank) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(costs)))
    expected = [int(allotment.costs[share].sum() + walks[share].max(initial=0)) for share in shares]
    assert allotment.loads.tolist() == expected


def test_a_rank_with_a_long_walk_gets_less_of_the_rest() -> None:
    costs, walks = np.array([10] * 8), np.array([40, 0, 0, 0, 0, 0, 0, 0])
    assert sorted(allot(costs, world_size=2, budget=1000, sequential=walks).loads.tolist()) == [60, 60]
    assert sorted(allot(costs, world_size=2, budget=1000).loads.tolist()) == [40, 40]


@pytest.mark.parametrize("sequential", [False, True])
def test_thousands_of_ranks_are_balanced_too(sequential: bool) -> None:
    frames = draw_phoenix_lengths(4096 * CLIPS_PER_RANK, seed=1)[0]
    costs = slot_frames(frames, STRIDE)
    allotment = allot(costs, world_size=4096, budget=10**6, sequential=costs // 4 if sequential else None)
    assert allotment.imbalance <= 1.01
    assert np.array_equal(np.sort(allotment.clips), np.arange(len(costs)))
