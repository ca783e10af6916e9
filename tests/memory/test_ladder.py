"""The ladder: each rung once, in order, and only where it helps; the budget goes down at once and up slowly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.memory.budget import FrameBudget
from trainer.memory.exhaustion import is_exhaustion, memory_figures
from trainer.memory.ladder import Rung, next_rung, rungs_taken
from trainer.passes import halve


def descend(**where: Any) -> list[str]:
    """All rungs from where a run stands, if nothing ever fits."""
    taken: list[str] = []
    here = {"backend": "replicated", "activation_checkpointing": False, "world_size": 2, "budget": 800, "floor": 300}
    while (rung := next_rung(**{**here, **where}, taken=taken)) is not None:
        taken.append(rung.name)
    return taken


def test_from_data_parallelism_the_ladder_goes_by_budget_and_checkpointing_to_the_hosts_memory() -> None:
    assert descend() == ["smaller budget", "activation checkpointing", "ZeRO-2", "ZeRO-3", "CPU offload"]


def test_what_cannot_help_is_left_out() -> None:
    assert "smaller budget" not in descend(budget=300)
    assert "activation checkpointing" not in descend(activation_checkpointing=True)
    assert descend(backend="zero2")[2:] == ["ZeRO-3", "CPU offload"]
    assert descend(backend="zero3")[2:] == ["CPU offload"]
    assert descend(backend="zero3_offload")[2:] == []
    # One rank shares nothing with nobody.
    assert descend(world_size=1)[2:] == ["CPU offload"]
    assert descend(backend="fsdp2")[2:] == ["FSDP2 on the host"]
    assert descend(backend="fsdp2_offload")[2:] == []


def test_a_rung_says_how_to_start_again() -> None:
    smaller = next_rung(backend="zero1", activation_checkpointing=True, world_size=2, budget=800, floor=500, taken=[])
    assert smaller is not None
    assert smaller.flags == ("--max_frames_per_microbatch", "500")
    zero = next_rung(backend="zero1", activation_checkpointing=True, world_size=2, budget=500, floor=500, taken=[])
    assert zero is not None
    assert dict(zero.environment)["ACCELERATE_DEEPSPEED_CONFIG_FILE"].endswith("ds_configs/zero2.json")


def test_rungs_travel_through_the_environment() -> None:
    assert rungs_taken({}) == []
    stored = '[{"name": "a", "flags": ["--x", "1"], "environment": [["A", "b"]], "reason": "why"}]'
    expected = Rung(name="a", flags=("--x", "1"), environment=(("A", "b"),), reason="why")
    assert rungs_taken({"SIGNSCALE_RUNGS": stored}) == [expected]


def test_the_budget_falls_below_what_was_used_and_comes_back_slowly() -> None:
    budget = FrameBudget(100_000, 300)
    budget.lower(2000, 1)
    assert budget.value == 1500
    for _ in range(99):
        assert not budget.rise()
    assert budget.rise()
    assert budget.value == 1576
    deep = FrameBudget(1000, 10)
    deep.lower(1000, 35)
    assert deep.value == int(1000 * 0.75**6)
    for _ in range(20):
        budget.lower(budget.value, 1)
    assert budget.value == 300
    steps = 0
    while budget.value < budget.start:
        budget.rise()
        steps += 1
    assert budget.value == 100_000
    assert not budget.rise()
    assert steps % 100 == 0


@given(costs=st.lists(st.integers(1, 400), min_size=2, max_size=40))
def test_halves_hold_every_clip_once_and_differ_by_little_more_than_a_clip(costs: list[int]) -> None:
    cell = np.arange(len(costs))
    one, other = halve(cell, np.array(costs))
    assert [*one, *other] == cell.tolist()
    assert len(one)
    assert len(other)
    assert abs(sum(costs[i] for i in one) - sum(costs[i] for i in other)) <= 2 * max(costs)


def test_a_single_clip_is_not_cut() -> None:
    [whole] = halve(np.array([7]), np.ones(8, dtype=np.int64))
    assert whole.tolist() == [7]


def test_exhaustion_is_told_from_other_failures() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_exhaustion(caught.value)
    assert is_exhaustion(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_exhaustion(MemoryError())
    assert not is_exhaustion(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_exhaustion(ValueError("can't allocate memory"))


def test_the_figures_of_an_event_are_those_of_the_process() -> None:
    import torch

    figures = memory_figures(torch.device("cpu"))
    assert 10 < figures["memory/resident_mb"] <= figures["memory/peak_mb"]
