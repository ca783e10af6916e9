"""The cost model: found again in noisy steps, not found where they cannot tell, and agreed on by all ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.allotment import allot
from trainer.data.batch import make_labels
from trainer.data.cost import (
    COST_MODEL,
    FRAMES_ONLY,
    CostFitter,
    CostModel,
    fit_cost_model,
    heaviest_share,
    read_cost_model,
    share_counts,
)
from trainer.data.lengths import draw_phoenix_lengths
from trainer.errors import InputError
from trainer.layout import lay_out, slot_frames
from trainer.models.build import build_model
from trainer.objectives.ctc import ctc_objective
from trainer.recipe import ModelRecipe

STRIDE = 4
TRUE = CostModel(per_slot=8e-4, per_walk=2e-3, per_cell=3e-2, samples=1, residual=0.0)


def draw_counts(steps: int, seed: int = 0) -> np.ndarray:
    """Slots, walks and cells of steps of 1 to 3 cells with 1 to 12 clips each, `[steps, 3]`."""
    rng = np.random.default_rng(seed)
    lengths = draw_phoenix_lengths(20 * steps, seed)[0]
    rows = []
    for _ in range(steps):
        cells = [rng.choice(lengths, rng.integers(1, 13)) for _ in range(rng.integers(1, 4))]
        slots = sum(int(slot_frames(cell, STRIDE).sum()) for cell in cells)
        rows.append((slots, sum(-(-int(cell.max()) // STRIDE) for cell in cells), len(cells)))
    return np.array(rows, dtype=np.float64)


def take_time(counts: np.ndarray, model: CostModel = TRUE, noise: float = 0.0, seed: int = 1) -> np.ndarray:
    """Rows of slots, walks, cells and the seconds that a model with this much noise would take, `[n, 4]`."""
    factor = np.exp(np.random.default_rng(seed).normal(0.0, noise, len(counts)))
    return np.column_stack([counts, model.seconds(*counts.T) * factor])


def fit(samples: np.ndarray) -> CostModel:
    model = fit_cost_model(samples)
    assert model is not None
    return model


def shares(model: CostModel, counts: np.ndarray) -> np.ndarray:
    """The part of the mean step that each term takes, in seconds, `[3]`."""
    return np.array([model.per_slot, model.per_walk, model.per_cell]) * counts.mean(axis=0)


def test_exact_steps_give_the_exact_coefficients() -> None:
    found = fit(take_time(draw_counts(100)))
    assert (found.per_slot, found.per_walk, found.per_cell) == pytest.approx((8e-4, 2e-3, 3e-2), rel=1e-6)
    assert found.samples == 100
    assert found.residual < 1e-9


def test_noise_leaves_each_term_known_within_a_tenth_of_a_step() -> None:
    counts = draw_counts(1000)
    found = fit(take_time(counts, noise=0.1))
    assert np.abs(shares(found, counts) - shares(TRUE, counts)).max() < 0.1 * shares(TRUE, counts).sum()
    assert found.residual == pytest.approx(0.1, rel=0.15)


def test_validations_checkpoints_and_noisy_neighbours_do_not_count() -> None:
    counts = draw_counts(1000)
    samples = take_time(counts, noise=0.03)
    rng = np.random.default_rng(2)
    disturbed = rng.random(len(samples)) < 0.15
    samples[disturbed, 3] *= rng.uniform(1.5, 30.0, disturbed.sum())
    found, undisturbed = fit(samples), fit(samples[~disturbed])
    assert found.samples <= (~disturbed).sum() + 5
    assert shares(found, counts) == pytest.approx(shares(undisturbed, counts), abs=0.01 * shares(TRUE, counts).sum())


def test_a_machine_that_is_slow_for_hours_gives_the_model_of_its_usual_speed() -> None:
    counts = draw_counts(1000)
    samples = take_time(counts, noise=0.05)
    samples[:400, 3] *= 2.0
    found = fit(samples)
    assert 540 <= found.samples <= 620
    assert np.abs(shares(found, counts) - shares(TRUE, counts)).max() < 0.1 * shares(TRUE, counts).sum()


def test_a_term_that_costs_nothing_is_zero_and_none_is_negative() -> None:
    flat = CostModel(per_slot=1e-3, per_walk=0.0, per_cell=0.0, samples=1, residual=0.0)
    for seed in range(10):
        found = fit(take_time(draw_counts(300, seed), flat, noise=0.05, seed=seed))
        assert min(found.per_slot, found.per_walk, found.per_cell) >= 0.0
        assert found.per_slot == pytest.approx(1e-3, rel=0.1)
    assert fit(take_time(draw_counts(300), flat)).per_walk == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        (take_time(draw_counts(20)), "too few"),
        (take_time(np.repeat([[1000.0, 60.0, 1.0]], 500, axis=0), noise=0.05), "all alike"),
        (take_time(np.array([[4.0 * n + 4, n, 1.0] for n in range(10, 510)]), noise=0.05), "one clip a cell"),
        (take_time(np.array([[24.0 * n, 2.0 * n, 1.0 * n] for n in range(10, 510)])), "all in one ratio"),
        (take_time(draw_counts(100), noise=1.0), "nothing but noise"),
        (np.zeros((200, 4)), "no time passed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samples_that_cannot_tell_give_no_model(samples: np.ndarray, why: str) -> None:
    assert fit_cost_model(samples) is None, why


def test_the_first_steps_do_not_count_and_the_oldest_are_forgotten() -> None:
    fitter = CostFitter(capacity=200, warm_up=5)
    assert fitter.fit() is None
    slow = CostModel(per_slot=1.0, per_walk=1.0, per_cell=1.0, samples=1, residual=0.0)
    for row in [*take_time(draw_counts(105), slow), *take_time(draw_counts(200))]:
        fitter.add(*row)
    found = fitter.fit()
    assert found is not None
    assert found.samples == 200
    assert found.per_slot == pytest.approx(TRUE.per_slot, rel=1e-6)

    warm = CostFitter(warm_up=50)
    for row in [*take_time(draw_counts(50), slow), *take_time(draw_counts(100))]:
        warm.add(*row)
    found = warm.fit()
    assert found is not None
    assert found.samples == 100


def test_the_sequential_term_is_in_slots_and_whole() -> None:
    outputs = np.array([1, 2, 75])
    assert TRUE.sequential(outputs).tolist() == [2, 5, 188]
    assert TRUE.sequential(outputs).dtype == np.int64
    assert FRAMES_ONLY.sequential(outputs).tolist() == [0, 0, 0]
    walks_alone = CostModel(per_slot=0.0, per_walk=1e-3, per_cell=0.0, samples=1, residual=0.0)
    terms = walks_alone.sequential(outputs)
    assert (np.diff(terms) > 0).all()
    # Many ranks' loads are added up in the allotment: they must stay far from the end of int64.
    assert terms.max() < 1 << 31


def test_balancing_by_the_model_makes_the_predicted_step_shorter() -> None:
    lengths = draw_phoenix_lengths(64 * 20, 5)[0].reshape(20, 64)
    model = CostModel(per_slot=1e-3, per_walk=8e-3, per_cell=0.0, samples=1, residual=0.0)
    times: dict[bool, list[float]] = {False: [], True: []}
    for frames in lengths:
        slots, outputs = slot_frames(frames, STRIDE), -(-frames // STRIDE)
        for balanced in times:
            sequential = model.sequential(outputs) if balanced else None
            shared = allot(slots, world_size=8, budget=10_000, sequential=sequential)
            times[balanced].append(max(float(model.seconds(*share_counts(shared, r, outputs))) for r in range(8)))
    assert np.mean(times[True]) < 0.97 * np.mean(times[False])


def test_the_heaviest_share_is_counted_cell_by_cell() -> None:
    frames = np.array([40, 8, 20, 16, 12])
    slots, outputs = slot_frames(frames, STRIDE), -(-frames // STRIDE)
    shared = allot(slots, world_size=2, budget=44)
    rank = int(shared.loads.argmax())
    cells = shared.cells(rank)
    expected = (
        sum(int(slots[cell].sum()) for cell in cells),
        sum(max((int(outputs[clip]) for clip in cell), default=1) for cell in cells),
        len(cells),
    )
    assert heaviest_share(shared, outputs) == expected
    assert len(cells) > 1
    assert expected[0] == shared.loads.max()


def test_a_model_survives_its_file_to_the_bit(tmp_path: Path) -> None:
    model = CostModel(per_slot=0.1 + 0.2, per_walk=1 / 3, per_cell=0.0, samples=77, residual=0.051)
    (tmp_path / COST_MODEL).write_text(json.dumps(model.to_json()))
    assert read_cost_model(tmp_path) == model
    assert read_cost_model(tmp_path / COST_MODEL) == model


@pytest.mark.parametrize(
    "change",
    [
        {"per_slot": -1.0},
        {"per_slot": "fast"},
        {"per_walk": float("nan")},
        {"per_cell": float("inf")},
        {"per_cell": None},
        {"samples": 1.5},
        {"samples": True},
        {"format": "signscale-shards"},
        {"per_frame": 1.0},
        {"per_slot": 0.0, "per_walk": 0.0},
    ],
    ids=str,
)
def test_a_damaged_model_is_refused_by_name(change: dict[str, Any]) -> None:
    text = json.dumps(TRUE.to_json() | change)
    with pytest.raises(InputError, match=r"run/cost_model\.json: expected a cost model as JSON.*; copy "):
        CostModel.parse(text, "run/cost_model.json")


def test_what_is_no_model_at_all_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '"x"', json.dumps(TRUE.to_json())[:-9]):
        with pytest.raises(InputError, match="expected a cost model"):
            CostModel.parse(text, "x")
    with pytest.raises(InputError, match="expected signscale-cost-model version 1, found version 2"):
        CostModel.parse(json.dumps(TRUE.to_json() | {"version": 2}), "x")
    with pytest.raises(InputError, match=r"cost_model\.json: cost model cannot be read \(No such file"):
        read_cost_model(tmp_path)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other on a busy machine take many times as long, now and then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_timings_of_the_real_teacher_give_a_plausible_model() -> None:
    torch.manual_seed(0)
    model = build_model(ModelRecipe(width=0.02, rnn_size=12, rnn_layers=1), feature_dim=16, num_classes=9)
    # What is asked is whether a model is found, not how fast this machine is: as many steps as that takes.
    fitter, found = CostFitter(), None
    for step, frames in enumerate(_small_cells(600), start=1):
        layout = lay_out(frames, STRIDE, np.arange(len(frames), dtype=np.uint64))
        labels = make_labels([np.arange(1, 5)] * len(frames), np.ones(len(frames)))
        # The processor's time, which other programs on the machine disturb less.
        started = time.process_time()
        logits = model(torch.randn(int(frames.sum()), 16), layout)
        ctc_objective(logits, layout.output_lengths, labels, None, 0.0).backward()
        fitter.add(layout.length, max(layout.output_lengths), 1, time.process_time() - started)
        if step % 60 == 0 and (found := fitter.fit()):
            break
    assert found is not None
    assert min(found.per_slot, found.per_walk, found.per_cell) >= 0.0
    predicted = found.seconds(np.array([400, 4000]), np.array([50, 50]), 1)
    assert np.isfinite(predicted).all()
    assert (predicted > 0).all()
    assert predicted[1] >= predicted[0]


def _small_cells(count: int) -> list[np.ndarray]:
    """Frames of the clips of cells whose size and longest clip have little to do with each other."""
    rng = np.random.default_rng(0)
    return [rng.integers(20, top, rng.integers(1, 17)) for top in rng.integers(30, 400, count)]
