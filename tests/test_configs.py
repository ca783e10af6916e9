"""Every shipped recipe runs as it is; overfitting five clips works, and says so when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, column, launch, metrics, train
from tests.test_recipe import SHIPPED

CONFIGS = [path.stem for path in SHIPPED]
TEACHERS = {
    # batch x accumulation, epochs / warm-up, rate, optimizer, decay, dropout / clip, smoothing / mixup, schedule
    "teacher_conservative": (8, 2, 150, 5, 3e-4, "adamw", 1e-4, 0.3, 1.0, 0.0, 0.0, "cosine"),
    "teacher_aggressive": (12, 1, 100, 3, 5e-4, "adam", 1e-4, 0.25, 0.5, 0.0, 0.0, "cosine"),
    "teacher_regularized": (8, 2, 200, 10, 2e-4, "adamw", 1e-3, 0.4, 1.0, 0.1, 0.2, "cosine_with_restarts"),
}


def _run(corpus: Path, run: Path, name: str, *flags: str) -> int:
    config = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    where = ["--data_dir", str(corpus), "--output_dir", str(run), "--trackers", "[]", "--num_workers", "0"]
    return launch(1, "trainer.train", [*config, *where, *flags], check=False).returncode


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("finetune", "distill_demo")])
def test_recipe_runs_for_a_step_at_full_size(corpus: Path, tmp_path: Path, name: str) -> None:
    code = _run(corpus, tmp_path / "run", name, "--max_steps", "1", "--train_wer_clips", "4")
    # One step does not reach 0 % WER, and overfit owns up to it.
    assert code == (1 if name == "overfit" else 0)
    assert column(tmp_path / "run", "step") == [0, 1]
    assert column(tmp_path / "run", "train/loss")[0] > 0


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_recipes_are_the_published_three(name: str) -> None:
    from trainer.parsing import parse_recipe

    flat = parse_recipe(["--config", str(ROOT / "configs" / f"{name}.yaml"), "--data_dir", "x"]).flat()
    fields = "batch_size gradient_accumulation_steps epochs warmup_epochs learning_rate optimizer weight_decay dropout"
    names = [*fields.split(), "gradient_clip", "label_smoothing", "mixup_alpha", "scheduler"]
    assert tuple(flat[field] for field in names) == TEACHERS[name]
    assert flat["min_lr"] == 1e-6
    assert flat["augment"] is True


def test_finetune_starts_from_the_best_weights_of_another_run(corpus: Path, tmp_path: Path) -> None:
    model = ["--width", "0.05", "--rnn_size", "24", "--rnn_layers", "1"]
    train(1, corpus, tmp_path / "first", *model, "--max_steps", "30", "--learning_rate", "3e-3", "--warmup_epochs", "0")
    code = _run(
        corpus, tmp_path / "tuned", "finetune", *model, "--init_from", str(tmp_path / "first"), "--max_steps", "1"
    )
    assert code == 0
    first, tuned = metrics(tmp_path / "first"), metrics(tmp_path / "tuned")
    best = json.loads((tmp_path / "first" / "checkpoints" / "best.json").read_text())["checkpoint"]
    reached = next(row for row in first if row["step"] == int(best.removeprefix("step-")) and "val/loss" in row)
    assert tuned[0]["val/loss"] == pytest.approx(reached["val/loss"], rel=1e-5)
    # Weights alone travel: the schedule starts anew.
    assert tuned[1]["step"] == 1


def test_overfit_reaches_zero_wer_on_five_clips(corpus: Path, tmp_path: Path) -> None:
    small = ["--width", "0.125", "--rnn_size", "64", "--learning_rate", "3e-3"]
    assert _run(corpus, tmp_path / "run", "overfit", *small) == 0
    assert column(tmp_path / "run", "val/wer")[0] > 50
    assert column(tmp_path / "run", "val/wer")[-1] == 0.0


def test_linear_batch_scaling_multiplies_batch_and_learning_rate_by_the_world_size(
    corpus: Path, tmp_path: Path
) -> None:
    flags = [
        "--batch_size",
        "5",
        "--gradient_accumulation_steps",
        "1",
        "--scheduler",
        "constant",
        "--warmup_epochs",
        "0",
    ]
    scaled = ["--batch_scaling", "linear", "--learning_rate", "1e-3", "--epochs", "1", "--log_every", "1"]
    train(2, corpus, tmp_path / "run", *flags, *scaled)
    assert column(tmp_path / "run", "lr") == [2e-3] * 4
