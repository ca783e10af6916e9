"""The learning rate is a pure function of progress, and weight decay falls on weight matrices alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import TINY, launch
from trainer.checkpoint.content import RunState
from trainer.data.plan import Plan
from trainer.loop import TrainingRun
from trainer.models.teacher import FeatureTeacher
from trainer.optimization import learning_rate, make_optimizer, plain_step
from trainer.recipe import BatchRecipe, OptimizationRecipe, Recipe, RunRecipe

DECAYING = ["cosine", "cosine_with_restarts", "onecycle"]
ALL = [*DECAYING, "constant"]


def rates(recipe: OptimizationRecipe, *, epochs: int, clips: int, batch: int, peak: float | None = None) -> np.ndarray:
    """Return the learning rate of every optimizer step of a run."""
    ends = [epoch + min(start + batch, clips) / clips for epoch in range(epochs) for start in range(0, clips, batch)]
    peak = recipe.learning_rate if peak is None else peak
    return np.array([learning_rate(end, total_epochs=epochs, peak=peak, recipe=recipe) for end in ends])


def schedule(kind: str, **options: Any) -> OptimizationRecipe:
    values: dict[str, Any] = {"learning_rate": 1e-3, "min_lr": 1e-6, "warmup_epochs": 2.0, "restarts": 4, **options}
    return OptimizationRecipe(scheduler=cast(Any, kind), **values)


# The schedule.


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(ALL),
    warmup=st.floats(min_value=0.01, max_value=9),
    clips=st.integers(min_value=1, max_value=60),
    batch=st.integers(min_value=1, max_value=70),
    peak=st.floats(min_value=1e-6, max_value=1),
)
def test_no_step_is_wasted_at_zero_and_none_exceeds_the_peak(
    kind: str, warmup: float, clips: int, batch: int, peak: float
) -> None:
    curve = rates(schedule(kind, warmup_epochs=warmup), epochs=10, clips=clips, batch=batch, peak=peak)
    assert (curve > 0).all()
    assert (curve <= peak * (1 + 1e-12)).all()
    rising = curve[: int(warmup * np.ceil(clips / batch) * 0.9)]
    assert (np.diff(rising) > 0).all() or len(np.unique(rising)) <= 1


@pytest.mark.parametrize("kind", ALL)
def test_warm_up_rises_in_equal_steps_from_above_zero_to_the_peak(kind: str) -> None:
    curve = rates(schedule(kind), epochs=20, clips=40, batch=8)
    np.testing.assert_allclose(curve[:10], 1e-3 * np.arange(1, 11) / 10, rtol=1e-12)


@pytest.mark.parametrize("kind", DECAYING)
@pytest.mark.parametrize("warmup", [0.0, 2.0])
@pytest.mark.parametrize("clips", [40, 43])
def test_a_run_ends_at_the_smallest_rate(kind: str, warmup: float, clips: int) -> None:
    curve = rates(schedule(kind, warmup_epochs=warmup), epochs=20, clips=clips, batch=8)
    assert curve[-1] == pytest.approx(1e-6, rel=1e-9)
    assert curve.min() >= 1e-6 * (1 - 1e-9)


@pytest.mark.parametrize("kind", ["cosine", "onecycle"])
def test_the_rate_falls_at_every_optimizer_step_after_the_warm_up(kind: str) -> None:
    curve = rates(schedule(kind), epochs=20, clips=40, batch=8)
    assert (np.diff(curve[9:]) < 0).all()


def test_halfway_down_the_cosine_is_the_mean_of_both_ends() -> None:
    curve = rates(schedule("cosine", warmup_epochs=0.0, min_lr=1e-4), epochs=20, clips=40, batch=8)
    assert curve[49] == pytest.approx((1e-3 + 1e-4) / 2)


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    assert set(rates(schedule("constant"), epochs=20, clips=40, batch=8)[9:]) == {1e-3}


def test_restarts_return_to_half_the_peak_each_time_and_never_below_the_floor() -> None:
    curve = rates(schedule("cosine_with_restarts", warmup_epochs=0.0, min_lr=2e-4), epochs=40, clips=200, batch=1)
    jumps = np.flatnonzero(np.diff(curve) > 1e-6)
    assert jumps.tolist() == [1998, 3998]
    np.testing.assert_allclose(curve[jumps + 1], [5e-4, 2.5e-4])
    np.testing.assert_allclose(curve[jumps], 2e-4, rtol=1e-3)
    # An eighth of the peak lies below the floor.
    np.testing.assert_allclose(curve[5999:], 2e-4)
    assert curve.min() >= 2e-4


def test_onecycle_without_a_warm_up_still_rises_for_three_tenths() -> None:
    curve = rates(schedule("onecycle", warmup_epochs=0.0), epochs=10, clips=100, batch=1)
    assert curve.argmax() == 299
    assert curve[0] == pytest.approx(1e-3 / 300)


def test_the_rate_depends_on_the_clips_seen_and_not_on_the_size_of_the_steps() -> None:
    recipe = schedule("cosine")
    fine = rates(recipe, epochs=10, clips=64, batch=4)
    coarse = rates(recipe, epochs=10, clips=64, batch=16)
    np.testing.assert_allclose(fine[3::4], coarse, rtol=1e-12)


def make_run(recipe: Recipe, *, num_clips: int, world_size: int) -> TrainingRun:
    """Build a run as far as its schedule goes."""
    plan = Plan(
        num_frames=np.full(num_clips, 50),
        min_outputs=np.full(num_clips, 3),
        keys=np.arange(num_clips, dtype=np.uint64),
        total_stride=4,
        seed=0,
    )
    nothing = cast(Any, None)
    return TrainingRun(
        # A budget that is named is not probed for.
        recipe=replace(recipe, batch=replace(recipe.batch, max_frames_per_microbatch=800)),
        engine=cast(Any, SimpleNamespace(world_size=world_size)),
        corpus=nothing,
        state=RunState(),
        loader=cast(Any, SimpleNamespace(plan=plan)),
        dev=nothing,
        train_subset=None,
        store=nothing,
        trackers=[],
        progress=cast(Any, SimpleNamespace(say=lambda text: None)),
        stop=nothing,
        relief=nothing,
        distillation=nothing,
        folder=nothing,
    )


@pytest.mark.parametrize(("epochs", "max_steps"), [(5, 0), (5, 7), (5, 8), (5, 9), (5, 12), (3, 100), (1, 1)])
@pytest.mark.parametrize("num_clips", [10, 16, 24, 5])
def test_the_schedule_ends_with_the_last_step_of_the_run(epochs: int, max_steps: int, num_clips: int) -> None:
    recipe = Recipe(
        batch=BatchRecipe(batch_size=8, gradient_accumulation_steps=1),
        run=RunRecipe(epochs=epochs, max_steps=max_steps),
        optimization=schedule("cosine", warmup_epochs=0.0),
    )
    run = make_run(recipe, num_clips=num_clips, world_size=1)
    ends = [e + min(s + 8, num_clips) / num_clips for e in range(epochs) for s in range(0, num_clips, 8)]
    end = ends[run.total_steps - 1]
    last = learning_rate(end, total_epochs=run.total_epochs, peak=run.peak, recipe=recipe.optimization)
    assert last == pytest.approx(1e-6, rel=1e-6)


def test_the_schedule_is_the_same_on_any_world_size() -> None:
    recipe = Recipe(batch=BatchRecipe(batch_size=8), run=RunRecipe(epochs=7))
    runs = [make_run(recipe, num_clips=50, world_size=world_size) for world_size in (1, 2, 8, 64)]
    assert len({(run.batch_size, run.peak, run.total_steps, run.total_epochs) for run in runs}) == 1


# The optimizer.


@pytest.fixture
def teacher() -> FeatureTeacher:
    return FeatureTeacher(feature_dim=6, num_classes=5, width=0.02, rnn_size=4, streams={"a": [0, 2], "b": [2, 6]})


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_weight_decay_falls_on_matrices_alone_and_no_parameter_is_left_out(kind: str, teacher: nn.Module) -> None:
    optimizer = make_optimizer(teacher, OptimizationRecipe(optimizer=cast(Any, kind), weight_decay=0.05))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    named = dict(teacher.named_parameters())
    assert {id(p) for p in named.values()} == set(decay)
    for name, parameter in named.items():
        is_matrix = "weight" in name and "norm" not in name
        assert decay[id(parameter)] == (0.05 if is_matrix else 0.0), name


@pytest.mark.parametrize(
    ("kind", "expected"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_the_optimizer_is_the_named_one(kind: str, expected: type, teacher: nn.Module) -> None:
    recipe = OptimizationRecipe(optimizer=cast(Any, kind), learning_rate=0.01, betas=(0.8, 0.95))
    optimizer = make_optimizer(teacher, recipe)
    assert type(optimizer) is expected
    for group in optimizer.param_groups:
        assert group["lr"] == 0.01
        assert group.get("betas", (group.get("momentum"), 0.95)) == (0.8, 0.95)


@pytest.mark.parametrize(("kind", "decoupled"), [("adamw", True), ("adam", False)])
def test_adamw_decays_weights_apart_from_the_gradient_and_adam_through_it(kind: str, decoupled: bool) -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = make_optimizer(
        layer, OptimizationRecipe(optimizer=cast(Any, kind), weight_decay=0.1, learning_rate=0.01)
    )
    layer.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    # Without a gradient AdamW shrinks by lr * decay; Adam normalises the decay away and moves by lr.
    expected = 1.0 - 0.01 * (0.1 if decoupled else 1.0)
    torch.testing.assert_close(layer.weight, torch.full((2, 2), expected))


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_a_plain_step_is_torchs_own(kind: str, teacher: FeatureTeacher) -> None:
    ours, torchs = teacher, copy.deepcopy(teacher)
    for model in (ours, torchs):
        optimizer = make_optimizer(model, OptimizationRecipe(optimizer=cast(Any, kind), learning_rate=0.01))
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if model is ours:
                plain_step(optimizer)
            else:
                optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.requires_grad


def test_training_does_not_load_a_compiler_that_it_does_not_use(corpus: Path, tmp_path: Path) -> None:
    done = launch(
        1,
        str(Path(__file__).with_name("loaded_modules.py")),
        ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "run"), *TINY, "--max_steps", "2"],
    )
    loaded = done.stdout.splitlines()[-1].split()
    assert "torch.optim" in loaded
    # With all that they import, a good part of a start (benchmarks/start.py).
    assert "torch._dynamo" not in loaded
    assert "sympy" not in loaded
