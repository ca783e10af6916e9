"""The weights of what training alone adds: kept by checkpoints, gone in whatever uses a trained model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from launch.cli import run as signscale
from tests.conftest import TINY, column, metrics, reset_process
from tests.publishing import publish
from trainer.errors import InputError
from trainer.evaluate import main as evaluate
from trainer.train import main as train_command

VAC = ["--visual_ctc_weight", "0.7", "--alignment_weight", "2"]
VISUAL = {"head.auxiliary.visual.weight", "head.auxiliary.visual.bias"}
STEPS = ["--max_steps", "4", "--evaluate_every", "4", "--log_every", "1", "--warmup_epochs", "0"]


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Undo what a run does to its process."""
    yield
    reset_process()


def train(corpus: Path, run: Path, *flags: str) -> None:
    common = ["--num_workers", "0", "--data_dir", str(corpus), "--output_dir", str(run)]
    assert train_command([*TINY, *common, *STEPS, *flags]) == 0
    reset_process()


def weights(run: Path) -> set[str]:
    """Name the weights in a run's last checkpoint."""
    name = json.loads((run / "checkpoints" / "last.json").read_text())["checkpoint"]
    return names(run / "checkpoints" / name / "model.safetensors")


def names(path: Path) -> set[str]:
    with safe_open(path, "np") as stored:
        return set(stored.keys())


def test_a_run_goes_on_with_them_and_starts_another_with_and_without(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(corpus, tmp_path / "whole", *VAC)
    train(corpus, tmp_path / "run", *VAC, "--stop_after_steps", "2")
    with pytest.raises(InputError, match=r"visual_ctc_weight is 0\.7 there and 0\.0 now"):
        train(corpus, tmp_path / "run", "--resume", "auto")
    reset_process()
    train(corpus, tmp_path / "run", *VAC, "--resume", "auto")
    for name in ("train/loss", "train/visual_ctc_loss", "train/alignment_loss"):
        assert column(tmp_path / "run", name) == column(tmp_path / "whole", name)
    assert weights(tmp_path / "run") >= VISUAL
    capfd.readouterr()
    # Into a run without them, and from there into one that has them again.
    train(corpus, tmp_path / "without", "--init_from", str(tmp_path / "run"))
    assert ": for training alone, left out" in capfd.readouterr().out
    assert weights(tmp_path / "without") == weights(tmp_path / "run") - VISUAL
    assert not [name for row in metrics(tmp_path / "without") for name in row if "visual" in name]
    train(corpus, tmp_path / "with", "--init_from", str(tmp_path / "without"), *VAC)
    assert ": for training alone, started fresh" in capfd.readouterr().out
    assert weights(tmp_path / "with") == weights(tmp_path / "run")


def test_a_model_starts_from_the_same_weights_with_and_without_them(corpus: Path, tmp_path: Path) -> None:
    for name, flags in (("with", VAC), ("without", [])):
        train(corpus, tmp_path / name, *flags)
    # Before the first step, and after one whose main CTC loss is that of the same weights.
    assert column(tmp_path / "with", "val/loss")[0] == column(tmp_path / "without", "val/loss")[0]
    assert column(tmp_path / "with", "train/ctc_loss")[0] == column(tmp_path / "without", "train/loss")[0]


def test_whoever_uses_a_trained_model_never_sees_them(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, taught = tmp_path / "plain", tmp_path / "taught"
    publish(plain, corpus, *TINY, "--rnn_size", "10")
    train(corpus, taught, *VAC, "--normalization", "none", "--teacher", str(plain), "--feature_weight", "0.5")
    publish(tmp_path / "alone", corpus, *TINY)
    assert weights(taught) - VISUAL - weights(tmp_path / "alone") == {
        f"head.auxiliary.projection.{part}" for part in ("weight", "bias")
    }
    capfd.readouterr()
    described = []
    for run in (taught, tmp_path / "alone"):
        assert signscale(["describe", "--checkpoint", str(run), "--json", "--no-measure"]) == 0
        described.append(json.loads(capfd.readouterr().out))
    for name in ("parameters", "flops_per_second"):
        assert described[0][name] == described[1][name]
    assert evaluate(["--checkpoint", str(taught), "--split", "dev", "--beam_width", "1"]) == 0
    reset_process()
    found = json.loads((taught / "evaluation" / "dev.json").read_text())
    assert found["wer"] == min(column(taught, "val/wer")[1:])
    # The file is compared with the run on its dev split before it appears.
    out = tmp_path / "exported"
    assert signscale(["export", "--checkpoint", str(taught), "--format", "safetensors", "--output", str(out)]) == 0
    assert not [name for name in names(out / "model.safetensors") if "auxiliary" in name]
    capfd.readouterr()
    clip = next((corpus / "test").glob("*.npz"))
    assert signscale(["predict", str(clip), "--checkpoint", str(taught)]) == 0
