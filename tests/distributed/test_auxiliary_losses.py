"""What training alone adds to a model: the same losses and gradients on any number of ranks, and gone afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.conftest import column, launch, metrics, train
from tests.distributed import backends

VAC = ["--visual_ctc_weight", "0.7", "--alignment_weight", "2", "--alignment_temperature", "4"]
SHORT = [
    *["--max_steps", "8", "--evaluate_every", "8", "--log_every", "1", "--gradient_accumulation_steps", "1"],
    *["--warmup_epochs", "0", "--learning_rate", "1e-3", "--batch_size", "6"],
]
WHOLE = ["--augment", "true", "--mixup_alpha", "0.4", "--dropout", "0.3", "--label_smoothing", "0.1"]
EVERYTHING, SOME, ONE_CLIP = "100000", "150", "1"


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another stride and with features of another size than its students'."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    flags = ["--max_steps", "40", "--evaluate_every", "40", "--learning_rate", "1e-2", "--warmup_epochs", "0"]
    train(1, corpus, run, *flags, "--total_stride", "2", "--width", "0.04", "--rnn_size", "20", *VAC)
    return run


def taught(teacher: Path) -> list[str]:
    return ["--teacher", str(teacher), "--feature_weight", "1.5", "--distill_blank_weight", "0.4", *VAC]


def tensors(run: Path) -> dict[str, list[int]]:
    """Names and shapes of the weights in a run's last checkpoint."""
    name = json.loads((run / "checkpoints" / "last.json").read_text())["checkpoint"]
    with safe_open(run / "checkpoints" / name / "model.safetensors", "np") as stored:
        return {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118


def test_all_terms_follow_one_curve_on_one_rank_and_on_two(corpus: Path, tmp_path: Path, teacher: Path) -> None:
    runs = []
    for world_size, budget in ((1, EVERYTHING), (1, SOME), (2, SOME)):
        runs.append(tmp_path / str(len(runs)))
        flags = [*SHORT, *WHOLE, *taught(teacher), "--model", "student", "--max_frames_per_microbatch", budget]
        train(world_size, corpus, runs[-1], *flags, "--width", "0.1")
    for name in ("loss", "ctc_loss", "distillation_loss", "feature_loss", "visual_ctc_loss", "alignment_loss"):
        expected = np.array(column(runs[0], f"train/{name}"))
        assert len(expected) == 8
        assert expected.min() > 1e-3, "a term that vanishes would agree with anything"
        for run in runs[1:]:
            found = np.array(column(run, f"train/{name}"))
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=name)
    parts = {name: np.array(column(runs[0], f"train/{name}")) for name in ("loss", "ctc_loss", "distillation_loss")}
    extra = {name: np.array(column(runs[0], f"train/{name}_loss")) for name in ("feature", "visual_ctc", "alignment")}
    total = 0.3 * parts["ctc_loss"] + 0.7 * parts["distillation_loss"]
    total += 1.5 * extra["feature"] + 0.7 * extra["visual_ctc"] + 2 * extra["alignment"]
    np.testing.assert_allclose(parts["loss"], total, rtol=1e-5)


def test_the_gradient_of_a_global_batch_is_that_of_one_process(corpus: Path, tmp_path: Path, teacher: Path) -> None:
    worker = str(Path(__file__).parent / "gradient_worker.py")
    gradients = {}
    for world_size, budget in ((1, EVERYTHING), (2, SOME)):
        out = tmp_path / f"gradient{world_size}.safetensors"
        arguments = [str(out), str(corpus), str(tmp_path / f"run{world_size}"), budget, *taught(teacher)]
        launch(world_size, worker, arguments)
        gradients[world_size] = load_file(out)
    largest = max(float(np.abs(gradient).max()) for gradient in gradients[1].values())
    for name in ("visual.weight", "projection.weight"):
        assert np.abs(gradients[1][f"head.auxiliary.{name}"]).max() > 1e-3
    for name, expected in gradients[1].items():
        assert np.abs(gradients[2][name] - expected).max() <= 1e-6 * max(1.0, largest), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero1", "zero3", "fsdp2"])
def test_sharded_backends_follow_it(corpus: Path, tmp_path: Path, teacher: Path, backend: str) -> None:
    flags = [*SHORT, *taught(teacher), "--max_steps", "5", "--max_frames_per_microbatch", SOME]
    train(1, corpus, tmp_path / "whole", *flags)
    backends.run(backend, 2, corpus, tmp_path / "parts", *flags, "--activation_checkpointing", "true")
    for name in ("loss", "feature_loss", "visual_ctc_loss", "alignment_loss"):
        expected = column(tmp_path / "whole", f"train/{name}")
        np.testing.assert_allclose(column(tmp_path / "parts", f"train/{name}"), expected, rtol=2e-5)


def test_a_model_goes_on_and_starts_another_with_and_without(corpus: Path, tmp_path: Path) -> None:
    train(1, corpus, tmp_path / "whole", *SHORT, *VAC)
    train(1, corpus, tmp_path / "run", *SHORT, *VAC, "--stop_after_steps", "3")
    refused = train(1, corpus, tmp_path / "run", *SHORT, "--resume", "auto", check=False)
    assert refused.returncode == 2
    assert "visual_ctc_weight is 0.7 there and 0.0 now" in refused.stderr
    train(1, corpus, tmp_path / "run", *SHORT, *VAC, "--resume", "auto")
    assert column(tmp_path / "run", "train/alignment_loss") == column(tmp_path / "whole", "train/alignment_loss")
    extra = {"head.auxiliary.visual.weight", "head.auxiliary.visual.bias"}
    assert extra <= tensors(tmp_path / "run").keys()
    # Into a run without it, and from there into one with it again.
    start = ["--max_steps", "1", "--evaluate_every", "1", "--init_from"]
    said = train(1, corpus, tmp_path / "without", *start, str(tmp_path / "run")).stdout
    assert "head.auxiliary.visual.bias, head.auxiliary.visual.weight: for training alone, left out" in said
    assert tensors(tmp_path / "without").keys() == tensors(tmp_path / "run").keys() - extra
    assert not [name for row in metrics(tmp_path / "without") for name in row if "visual" in name]
    said = train(1, corpus, tmp_path / "with", *start, str(tmp_path / "without"), *VAC).stdout
    assert "for training alone, started fresh" in said
    assert tensors(tmp_path / "with") == tensors(tmp_path / "run")


def test_whoever_uses_a_trained_model_never_sees_it(corpus: Path, tmp_path: Path, teacher: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    small = ["--max_steps", "1", "--evaluate_every", "1"]
    train(1, corpus, run, *small, *taught(teacher))
    train(1, corpus, plain, *small)
    assert {name for name in tensors(run) if "projection" in name}
    described = [
        json.loads(launch(1, "launch.describe", ["--checkpoint", str(one), "--json", "--no-measure"]).stdout)
        for one in (run, plain)
    ]
    for name in ("parameters", "flops_per_second"):
        assert described[0][name] == described[1][name]
    launch(1, "trainer.evaluate", ["--checkpoint", str(run), "--split", "dev"])
    found = json.loads((run / "evaluation" / "dev.json").read_text())
    assert found["wer"] == column(run, "val/wer")[-1]
    out = tmp_path / "exported"
    launch(1, "launch.export", ["--checkpoint", str(run), "--format", "safetensors", "--output", str(out)])
    with safe_open(out / "model.safetensors", "np") as stored:
        assert not [name for name in stored.keys() if "auxiliary" in name]  # noqa: SIM118
