"""What training alone adds to a model: the same losses and gradients on any number of ranks, cut in any way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import column, launch, train, weights
from tests.distributed import backends
from tests.distributed.curves import check_one_curve

VAC = ["--visual_ctc_weight", "0.7", "--alignment_weight", "2", "--alignment_temperature", "4"]
SHORT = [
    *["--max_steps", "8", "--evaluate_every", "8", "--log_every", "1", "--gradient_accumulation_steps", "1"],
    *["--warmup_epochs", "0", "--learning_rate", "1e-3", "--batch_size", "6"],
]
WHOLE = ["--augment", "true", "--mixup_alpha", "0.4", "--dropout", "0.3", "--label_smoothing", "0.1"]
TERMS = ("ctc_loss", "distillation_loss", "feature_loss", "visual_ctc_loss", "alignment_loss")
PARTS = [(name, kind) for name in ("visual", "projection") for kind in ("weight", "bias")]
EVERYTHING, SOME = "100000", "150"


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another stride and with features of another size than its students'."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    flags = ["--max_steps", "20", "--evaluate_every", "20", "--learning_rate", "1e-2", "--warmup_epochs", "0"]
    train(1, corpus, run, *flags, "--total_stride", "2", "--rnn_size", "20", *VAC)
    return run


def taught(teacher: Path) -> list[str]:
    return ["--teacher", str(teacher), "--feature_weight", "1.5", "--distill_blank_weight", "0.4", *VAC]


def test_terms_and_gradients_of_a_global_batch_are_those_of_one_process(
    corpus: Path, tmp_path: Path, teacher: Path
) -> None:
    worker = str(Path(__file__).parent / "gradient_worker.py")
    found = []
    for world_size, budget in ((1, EVERYTHING), (2, SOME)):
        out = tmp_path / f"{len(found)}.safetensors"
        arguments = [str(out), str(corpus), str(tmp_path / f"run{len(found)}"), budget, *taught(teacher)]
        launch(world_size, worker, arguments)
        found.append(load_file(out))
    largest = max(float(np.abs(value).max()) for name, value in found[0].items() if not name.startswith("term/"))
    for name in ("visual.weight", "projection.weight"):
        assert np.abs(found[0][f"head.auxiliary.{name}"]).max() > 1e-3, "a gradient that vanishes would agree"
    for name in TERMS:
        assert found[0][f"term/{name}"] > 1e-2
    assert found[1].keys() == found[0].keys()
    for name, expected in found[0].items():
        if name.startswith("term/"):
            np.testing.assert_allclose(found[1][name], expected, rtol=1e-6, err_msg=name)
        else:
            assert np.abs(found[1][name] - expected).max() <= 1e-6 * max(1.0, largest), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_all_terms_follow_one_curve_on_one_rank_and_on_two(
    corpus: Path, tmp_path: Path, teacher: Path, model: str
) -> None:
    runs = []
    for world_size, budget in ((1, EVERYTHING), (1, SOME), (2, SOME)):
        runs.append(tmp_path / str(len(runs)))
        flags = [*SHORT, *WHOLE, *taught(teacher), "--model", model, "--max_frames_per_microbatch", budget]
        # Adam divides gradients that are nearly nothing by themselves, and so makes another order of summation show.
        train(world_size, corpus, runs[-1], *flags, "--width", "0.1", "--optimizer", "sgd", "--learning_rate", "0.05")
    check_one_curve(runs, ("loss", *TERMS), steps=8)
    weighted = zip((0.3, 0.7, 1.5, 0.7, 2.0), TERMS, strict=True)
    total = sum(weight * np.array(column(runs[0], f"train/{name}")) for weight, name in weighted)
    np.testing.assert_allclose(column(runs[0], "train/loss"), total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero1", "zero3", "fsdp2"])
def test_sharded_backends_follow_it(corpus: Path, tmp_path: Path, teacher: Path, backend: str) -> None:
    flags = [*SHORT, *taught(teacher), "--max_steps", "5", "--max_frames_per_microbatch", SOME]
    train(1, corpus, tmp_path / "whole", *flags)
    backends.run(backend, 2, corpus, tmp_path / "parts", *flags, "--activation_checkpointing", "true")
    for name in ("loss", "feature_loss", "visual_ctc_loss", "alignment_loss"):
        expected = column(tmp_path / "whole", f"train/{name}")
        np.testing.assert_allclose(column(tmp_path / "parts", f"train/{name}"), expected, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero1", "zero3", "fsdp2"])
def test_a_run_with_them_goes_on_in_the_same_bits_under_sharded_backends(
    corpus: Path, tmp_path: Path, teacher: Path, backend: str
) -> None:
    """Their weights and what the optimizer keeps of them are saved and loaded as the model's own are."""
    flags = [*SHORT, *WHOLE, *taught(teacher), "--max_steps", "6", "--max_frames_per_microbatch", SOME]
    run, whole = tmp_path / "run", tmp_path / "whole"
    backends.run(backend, 2, corpus, whole, *flags)
    backends.run(backend, 2, corpus, run, *flags, "--stop_after_steps", "3")
    stopped = auxiliary(run)
    assert stopped.keys() == {f"head.auxiliary.{name}.{kind}" for name, kind in PARTS}
    backends.run(backend, 2, corpus, run, *flags, "--resume", "auto")
    for name in ("loss", *TERMS):
        assert len(column(run, f"train/{name}")) == 6
        assert column(run, f"train/{name}") == column(whole, f"train/{name}")
    assert weights(run) == weights(whole)
    for name, value in auxiliary(run).items():
        assert np.abs(value - stopped[name]).max() > 1e-4, "a weight that stands still was not trained"
    # What one backend saved of them, another goes on from.
    other, ends = tmp_path / "other", ["--resume", str(run / "checkpoints" / "step-000000003")]
    train(1, corpus, other, *flags, *ends)
    np.testing.assert_allclose(column(other, "train/loss"), column(whole, "train/loss")[3:], rtol=2e-5)


def auxiliary(run: Path) -> dict[str, Any]:
    """What training alone added to a run's last checkpoint."""
    name = json.loads((run / "checkpoints" / "last.json").read_text())["checkpoint"]
    stored = load_file(run / "checkpoints" / name / "model.safetensors")
    return {name: value for name, value in stored.items() if name.startswith("head.auxiliary.")}
