"""The promise under every backend: the same losses and gradients, and any of them goes on where another stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import column, metrics, weights
from tests.distributed.backends import BACKENDS, run

RECIPE = [
    *["--log_every", "1", "--evaluate_every", "10", "--save_every", "5", "--batch_size", "7"],
    *["--gradient_accumulation_steps", "1", "--dropout", "0.2", "--warmup_epochs", "1", "--learning_rate", "1e-3"],
    *["--gradient_clip", "0.5", "--augment", "true", "--mixup_alpha", "0.3"],
]
STEPS = ["--max_steps", "20"]
SHORT = ["--max_steps", "8", "--evaluate_every", "100"]


@pytest.fixture(scope="module")
def single(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that holds everything in one cell."""
    out = tmp_path_factory.mktemp("single") / "run"
    run("replicated", 1, corpus, out, *RECIPE, *STEPS)
    return out


def assert_same_curve(one: Path, other: Path) -> None:
    np.testing.assert_allclose(column(one, "train/loss"), column(other, "train/loss"), rtol=1e-5)
    np.testing.assert_allclose(column(one, "train/grad_norm"), column(other, "train/grad_norm"), rtol=1e-4)
    assert column(one, "val/wer") == column(other, "val/wer")
    np.testing.assert_allclose(column(one, "val/loss"), column(other, "val/loss"), rtol=1e-5)


@pytest.mark.parametrize(("backend", "budget"), [("zero1", "1"), ("zero2", "150"), ("zero3", "150"), ("fsdp2", "150")])
def test_two_ranks_follow_the_curve_of_one_process(
    single: Path, corpus: Path, tmp_path: Path, backend: str, budget: str
) -> None:
    run(backend, 2, corpus, tmp_path / "run", *RECIPE, *STEPS, "--max_frames_per_microbatch", budget)
    assert_same_curve(tmp_path / "run", single)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["1", "150", "100000"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_follows_the_curve_of_one_process(
    single: Path, corpus: Path, tmp_path: Path, backend: str, world_size: int, budget: str
) -> None:
    run(backend, world_size, corpus, tmp_path / "run", *RECIPE, *STEPS, "--max_frames_per_microbatch", budget)
    assert_same_curve(tmp_path / "run", single)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_run_ends_in_the_same_bits(corpus: Path, tmp_path: Path, backend: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(backend, 2, corpus, whole, *RECIPE, *SHORT)
    run(backend, 2, corpus, stopped, *RECIPE, *SHORT, "--stop_after_steps", "5")
    run(backend, 2, corpus, stopped, *RECIPE, *SHORT, "--resume", "auto")
    assert column(stopped, "train/loss") == column(whole, "train/loss")
    assert weights(stopped) == weights(whole)


CHANGES = [
    ("replicated", 2, "zero3", 2),
    ("zero3", 2, "fsdp2", 1),
    ("fsdp2", 2, "zero2", 2),
    ("zero2", 2, "replicated", 1),
    ("zero1", 1, "zero3", 2),
    ("zero2_offload", 2, "fsdp2", 2),
]


@pytest.mark.parametrize(
    ("before", "ranks_before", "after", "ranks_after"),
    [CHANGES[0], *(pytest.param(*change, marks=pytest.mark.slow) for change in CHANGES[1:])],
)
def test_a_run_goes_on_under_another_backend_and_world_size(
    single: Path, corpus: Path, tmp_path: Path, before: str, ranks_before: int, after: str, ranks_after: int
) -> None:
    out = tmp_path / "run"
    run(before, ranks_before, corpus, out, *RECIPE, *STEPS, "--stop_after_steps", "7")
    run(after, ranks_after, corpus, out, *RECIPE, *STEPS, "--resume", "auto")
    # Adam's moments went along: without them the first step would already differ in its first digit.
    assert_same_curve(out, single)


# Precision.


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_follow_one_curve_under_all_backends(corpus: Path, tmp_path: Path, precision: str) -> None:
    curves = {}
    for backend in BACKENDS:
        out = tmp_path / backend / "run"
        run(backend, 2, corpus, out, *RECIPE, *SHORT, "--mixed_precision", precision)
        curves[backend] = column(out, "train/loss")
    exact = tmp_path / "exact" / "run"
    run("replicated", 2, corpus, exact, *RECIPE, *SHORT)
    for curve in curves.values():
        np.testing.assert_allclose(curve, curves["replicated"], rtol=1e-5)
        np.testing.assert_allclose(curve, column(exact, "train/loss"), rtol=2e-2)
    # And it was another precision, not float32 under another name.
    assert curves["replicated"] != column(exact, "train/loss")


@pytest.mark.parametrize(
    "backend", ["replicated", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3", "fsdp2"))]
)
def test_a_loss_scale_that_is_too_large_halves_until_it_fits_and_grows_again(
    corpus: Path, tmp_path: Path, backend: str
) -> None:
    worker = str(Path(__file__).with_name("overflow_worker.py"))
    flags = [*RECIPE, "--max_steps", "18", "--evaluate_every", "100", "--mixed_precision", "fp16"]
    # 2^30 overflows float16's 65504 in the first backward passes; it grows after 4 good steps in a row.
    extra = {"LOSS_SCALE": str(2.0**30), "GROWTH_INTERVAL": "4"}
    done = run(backend, 2, corpus, tmp_path / "run", *flags, module=worker, extra=extra)
    skipped = done.stdout.count("fp16 gradient overflowed, skipped")
    assert 3 <= skipped <= 16
    state = json.loads(max((tmp_path / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["skipped_steps"] == skipped
    # Every skip halves it; every run of 4 good steps doubles it.
    halved = np.log2(2.0**30 / state["loss_scale"]["value"])
    assert skipped - (18 - skipped) // 4 <= halved <= skipped
    assert np.isfinite([row["train/loss"] for row in metrics(tmp_path / "run") if row.get("train/loss")]).all()


def test_a_loss_scale_that_collapses_ends_the_run_with_the_module_that_overflows(corpus: Path, tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("overflow_worker.py"))
    flags = [*RECIPE, "--max_steps", "60", "--evaluate_every", "100", "--mixed_precision", "fp16"]
    extra = {"LOSS_SCALE": "4", "GROWTH_INTERVAL": "4", "OVERFLOW": "gradient"}
    done = run("replicated", 2, corpus, tmp_path / "run", *flags, module=worker, extra=extra, check=False)
    assert done.returncode == 1
    assert "failed: the fp16 loss scale collapsed (below 1)" in done.stderr
    assert "use --mixed_precision bf16 or no" in done.stderr


# What is not finite.


@pytest.mark.parametrize(
    "backend", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("replicated", "zero3", "fsdp2"))]
)
def test_a_clip_whose_loss_is_not_finite_is_skipped_by_all_ranks_and_named(
    corpus: Path, tmp_path: Path, backend: str
) -> None:
    worker = str(Path(__file__).with_name("overflow_worker.py"))
    done = run(
        backend,
        2,
        corpus,
        tmp_path / "run",
        *RECIPE,
        *SHORT,
        module=worker,
        extra={"OVERFLOW": "loss", "RANK_OF_IT": "1"},
    )
    assert "gradient not finite, skipped on all ranks; clips: train-" in done.stdout
    state = json.loads(max((tmp_path / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["skipped_steps"] == 1
    assert state["step"] == 8
    assert column(tmp_path / "run", "skipped_steps")[-1] == 1


# Activation checkpointing.


@pytest.mark.parametrize(
    "backend", ["replicated", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3", "fsdp2"))]
)
def test_activation_checkpointing_changes_no_loss(single: Path, corpus: Path, tmp_path: Path, backend: str) -> None:
    run(backend, 2, corpus, tmp_path / "run", *RECIPE, *STEPS, "--activation_checkpointing", "true")
    assert_same_curve(tmp_path / "run", single)


# Compiling.


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve_with_few_graphs(single: Path, corpus: Path, tmp_path: Path) -> None:
    said = run("replicated", 1, corpus, tmp_path / "run", *RECIPE, *STEPS, "--compile", "true").stdout
    assert_same_curve(tmp_path / "run", single)
    [graphs] = [int(line.split(" made ")[1].split()[0]) for line in said.splitlines() if "torch.compile made" in line]
    # 13 blocks, for training and for evaluation, whatever the sizes of the cells.
    assert 0 < graphs <= 26


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["replicated", "zero2", "fsdp2"])
def test_a_fused_optimizer_follows_the_same_rule(single: Path, corpus: Path, tmp_path: Path, backend: str) -> None:
    run(backend, 2, corpus, tmp_path / "run", *RECIPE, *STEPS, "--fused_optimizer", "true", "--stop_after_steps", "9")
    run(backend, 2, corpus, tmp_path / "run", *RECIPE, *STEPS, "--fused_optimizer", "true", "--resume", "auto")
    assert_same_curve(tmp_path / "run", single)
