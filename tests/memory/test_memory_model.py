"""Counting what passes allocate, fitting it, and what each backend holds of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trainer.data.plan import Plan
from trainer.layout import slot_frames
from trainer.memory.counting import AllocationCounter, SavedBytes
from trainer.memory.model import Load, MemoryModel, fit
from trainer.memory.static import Backend, ModelSize, static_memory, zero_backend
from trainer.memory.worst import find_worst

SIZE = ModelSize(total=1_000_000, largest_block=400_000, largest_weight=100_000)


def test_a_fit_recovers_what_made_the_figures() -> None:
    made = MemoryModel(fixed=3e8, per_slot=9e4, per_padded=2e4)
    loads = [Load(slots=s, padded=p) for s, p in ((200, 50), (400, 100), (400, 380), (1600, 500), (3000, 2900))]
    noise = np.random.default_rng(0).normal(0.0, 2e5, len(loads))
    found = fit(loads, [made.peak(load) + n for load, n in zip(loads, noise, strict=True)])
    assert found.fixed == pytest.approx(made.fixed, rel=0.02)
    assert found.per_slot == pytest.approx(made.per_slot, rel=0.02)
    assert found.per_padded == pytest.approx(made.per_padded, rel=0.05)


def test_terms_are_never_negative() -> None:
    found = fit([Load(slots=100, padded=20), Load(slots=200, padded=300)], [2e7, 1.5e7])
    assert min(found.fixed, found.per_slot, found.per_padded) >= 0.0


def test_a_single_pass_is_laid_to_its_slots() -> None:
    found = fit([Load(slots=100, padded=25)], [5e7])
    assert found == MemoryModel(fixed=0.0, per_slot=5e5, per_padded=0.0)


def test_the_largest_budget_fills_the_room_and_no_more() -> None:
    model = MemoryModel(fixed=1e9, per_slot=1e5, per_padded=4e4)
    budget = model.largest_budget(4 * 10**9, margin=0.1, padding=0.5)
    assert model.peak(Load(slots=budget, padded=budget // 2)) <= 3.6e9
    assert model.peak(Load(slots=budget + 2, padded=budget // 2 + 1)) > 3.6e9
    assert model.largest_budget(10**9, margin=0.1, padding=0.5) == 0


def test_what_autograd_keeps_is_counted_once() -> None:
    weight = torch.randn(32, 64, requires_grad=True)
    x = torch.randn(100, 32)
    kept = SavedBytes(x, weight)
    with kept:
        hidden = (x @ weight).relu()
        (hidden * hidden).sum()
    # The hidden values, for relu and twice for the product: one storage.
    assert kept.total == 100 * 64 * 4


def test_allocations_are_counted_while_they_live() -> None:
    x = torch.randn(1000)
    with AllocationCounter(x) as counter:
        y = x * 2
        z = y[:500].view(50, 10)
        assert counter.live == 4000
        w = y + 1
        del y, z
        assert (counter.live, counter.peak) == (4000, 8000)
        w.add_(x)
        del w
        assert (counter.live, counter.peak) == (0, 8000)


def test_a_backward_pass_is_counted_too() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    x = torch.randn(512, 64)
    with AllocationCounter(x, *model.parameters()) as counter:
        model(x).square().mean().backward()
    gradients = sum(p.numel() for p in model.parameters()) * 4
    assert counter.live == pytest.approx(gradients, abs=64)
    assert counter.peak > 2 * 512 * 256 * 4


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_shards_shrink_with_the_ranks_and_copies_do_not(world_size: int) -> None:
    def kept(backend: Backend) -> int:
        return static_memory(SIZE, backend=backend, world_size=world_size, optimizer="adamw", on_cuda=True).kept

    weights = SIZE.total * 4
    assert kept(Backend(kind="replicated")) == 4 * weights
    # Weights and the local gradient in full; the float32 part and two states shared.
    assert kept(Backend(kind="zero", stage=2)) == 2 * weights + 3 * weights // world_size
    assert kept(Backend(kind="zero", stage=3)) == 5 * weights // world_size
    assert kept(Backend(kind="fsdp2")) == 4 * weights // world_size


def test_offload_moves_states_to_the_host() -> None:
    def memory(*, offload: bool):  # type: ignore[no-untyped-def]
        backend = Backend(kind="zero", stage=3, bucket=1000, offload_optimizer=offload, offload_weights=offload)
        return static_memory(SIZE, backend=backend, world_size=2, optimizer="adamw", on_cuda=True)

    assert memory(offload=True).peak(0) < memory(offload=False).peak(0)
    assert memory(offload=False).host == 0
    assert memory(offload=True).host >= 4 * SIZE.total * 4 // 2


def test_a_deepspeed_configuration_is_read_with_its_defaults() -> None:
    found = zero_backend({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert (found.stage, found.offload_optimizer, found.offload_weights) == (2, True, False)
    assert found.bucket == 500_000_000
    smaller = zero_backend({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6}})
    assert smaller.bucket == 1_000_000


def test_worst_cells_bound_every_cell_of_the_epochs() -> None:
    draws = np.random.default_rng(1)
    frames = draws.integers(16, 300, 500)
    plan = Plan(
        num_frames=frames,
        min_outputs=np.ones(500, dtype=np.int64),
        keys=np.arange(500, dtype=np.uint64),
        total_stride=4,
        seed=3,
    )
    worst = find_worst(plan, size=16, world_size=2, budget=1200)
    assert worst.longest == frames.max()
    assert worst.floor == slot_frames(np.array([frames.max()]), 4)[0]
    for slots in (worst.floor, 700, 1200, 5000):
        largest, many = worst.largest(slots), worst.most_clips(slots)
        assert int(slot_frames(largest, 4).sum()) <= slots
        assert len(many) >= len(largest)
    # As full as whole clips allow.
    assert int(slot_frames(worst.largest(5000), 4).sum()) > 5000 - worst.floor
