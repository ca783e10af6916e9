"""The forecast counts what the trainer's own plan and allotment do, and recommends a window that keeps its promise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from trainer.data.allotment import allot
from trainer.data.cost import FRAMES_ONLY, CostModel, share_counts
from trainer.data.forecast import MOST_OVER_IDEAL, choose_window, forecast
from trainer.data.lengths import draw_phoenix_lengths
from trainer.data.plan import Plan
from trainer.layout import slot_frames
from trainer.randomness import mix

STRIDE, BUDGET = 4, 8 * 304
WALKING = CostModel(per_slot=8e-4, per_walk=2e-3, per_cell=3e-2, samples=1, residual=0.0)


def make_plan(clips: int, **settings: float) -> Plan:
    frames, glosses = draw_phoenix_lengths(clips, 0)
    keys = mix(np.arange(clips, dtype=np.uint64))
    return Plan(num_frames=frames, min_outputs=glosses, keys=keys, total_stride=STRIDE, seed=42, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [FRAMES_ONLY, WALKING], ids=["frames", "walks"])
@pytest.mark.parametrize("budget", [BUDGET, 600], ids=["one cell", "several cells"])
def test_figures_are_those_of_every_step_counted_rank_by_rank(model: CostModel, budget: int) -> None:
    plan, world_size, size = make_plan(500), 8, 64
    ratios, times, frames, slots_in_all = [], [], 0, 0
    for batch in plan.batches(0, size):
        if len(batch) < size:
            continue
        slots, outputs = slot_frames(batch.num_frames, STRIDE), -(-batch.num_frames // STRIDE)
        sequential = model.sequential(outputs) if model.per_walk else None
        shared = allot(slots, world_size=world_size, budget=budget, sequential=sequential)
        counts = [share_counts(shared, rank, outputs) for rank in range(world_size)]
        ratios.append(max(share[0] for share in counts) * world_size / batch.num_frames.sum())
        times.append(max(float(model.seconds(*share)) for share in counts))
        frames, slots_in_all = frames + int(batch.num_frames.sum()), slots_in_all + int(slots.sum())
    found = forecast(plan, size=size, world_size=world_size, budget=budget, model=model)
    assert found.steps_measured == len(ratios) == 7
    assert found.steps_per_epoch == 8
    assert found.step_over_ideal == pytest.approx(np.mean(ratios))
    assert found.seconds == pytest.approx(np.mean(times))
    assert found.padding == pytest.approx(1.0 - frames / slots_in_all)
    assert (found.cells_per_rank > 1) == (budget == 600)


def test_the_ideal_step_is_reached_by_clips_of_one_length_without_guards() -> None:
    frames = np.full(640, 96)
    plan = dataclasses.replace(make_plan(640), num_frames=frames)
    found = forecast(plan, size=64, world_size=8, budget=BUDGET, model=WALKING)
    guards = WALKING.per_slot * 8 * (int(slot_frames(frames[:1], STRIDE)[0]) - 96)
    assert found.seconds - found.ideal_seconds == pytest.approx(guards)
    assert found.imbalance == 1.0


def test_a_batch_smaller_than_the_world_leaves_ranks_idle() -> None:
    found = forecast(make_plan(100), size=16, world_size=64, budget=BUDGET, model=WALKING)
    assert found.idle_ranks == 48
    assert found.step_over_ideal > 4.0


def test_an_epoch_without_a_full_step_is_measured_as_it_is() -> None:
    found = forecast(make_plan(50), size=512, world_size=64, budget=BUDGET)
    assert (found.batch_clips, found.steps_per_epoch, found.steps_measured) == (50, 1, 1)


def test_more_epochs_measure_more_steps() -> None:
    plan = make_plan(500)
    assert forecast(plan, size=64, world_size=8, budget=BUDGET, epochs=3).steps_measured == 21


def test_mixup_reads_partners_too() -> None:
    assert forecast(make_plan(500), size=64, world_size=8, budget=BUDGET).mixed == 0.0
    assert forecast(make_plan(500, mixup_alpha=0.5), size=64, world_size=8, budget=BUDGET).mixed > 0.5


def test_a_sample_stands_for_millions_of_clips() -> None:
    many, few = make_plan(2_000_000), make_plan(200_000)
    large, small = (forecast(plan, size=512, world_size=64, budget=BUDGET, model=WALKING) for plan in (many, few))
    assert large.steps_per_epoch == 3907
    assert large.steps_measured == small.steps_measured == 100
    assert large.seconds == pytest.approx(small.seconds, rel=0.005)
    assert large.step_over_ideal == pytest.approx(small.step_over_ideal, abs=0.005)


def test_the_window_recommended_is_the_smallest_that_keeps_the_bar() -> None:
    plan, asked = make_plan(20_000), {"size": 512, "world_size": 64, "budget": BUDGET}
    window = choose_window(plan, **asked, model=WALKING)
    assert window is not None
    assert window > 1
    reached = {
        tried: forecast(
            dataclasses.replace(plan, shuffle_window=tried), **asked, model=WALKING, steps=max(16, 2 * tried)
        ).time_over_ideal
        for tried in (window // 2, window)
    }
    assert reached[window] <= MOST_OVER_IDEAL < reached[window // 2]


def test_no_window_is_recommended_where_none_helps() -> None:
    plan = make_plan(2000)
    assert choose_window(plan, size=512, world_size=64, budget=BUDGET, model=FRAMES_ONLY) == 1
    # Idle ranks stay idle in whatever order clips come.
    assert choose_window(plan, size=16, world_size=64, budget=BUDGET, model=WALKING) is None
