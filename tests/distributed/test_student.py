"""The student follows one loss curve, whatever divides the labour: ranks, budgets, backends, recomputed blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import column, train
from tests.distributed.backends import run as run_backend

STUDENT = [
    *["--model", "student", "--width", "0.1", "--max_steps", "12", "--log_every", "1", "--evaluate_every", "12"],
    *["--dropout", "0.3", "--augment", "true", "--mixup_alpha", "0.4", "--label_smoothing", "0.1"],
    *["--warmup_epochs", "0", "--learning_rate", "1e-3", "--batch_size", "6", "--gradient_accumulation_steps", "1"],
]


@pytest.fixture(scope="module")
def single(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, everything in one micro-batch."""
    run = tmp_path_factory.mktemp("single") / "run"
    train(1, corpus, run, *STUDENT, "--max_frames_per_microbatch", "100000")
    return run


def test_loss_per_step_on_two_ranks_is_that_of_one(corpus: Path, tmp_path: Path, single: Path) -> None:
    train(2, corpus, tmp_path / "run", *STUDENT, "--max_frames_per_microbatch", "150")
    expected = column(single, "train/loss")
    assert len(expected) == 12
    assert max(expected) - min(expected) > 0.1, "a loss that stands still would agree with anything"
    np.testing.assert_allclose(column(tmp_path / "run", "train/loss"), expected, rtol=2e-5)
    np.testing.assert_allclose(
        column(tmp_path / "run", "train/grad_norm"), column(single, "train/grad_norm"), rtol=1e-3
    )
    assert column(tmp_path / "run", "val/wer") == column(single, "val/wer")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero1", "zero3", "fsdp2"])
def test_sharded_backends_follow_it_with_blocks_recomputed(
    corpus: Path, tmp_path: Path, single: Path, backend: str
) -> None:
    run_backend(backend, 2, corpus, tmp_path / "run", *STUDENT, "--activation_checkpointing", "true")
    np.testing.assert_allclose(column(tmp_path / "run", "train/loss"), column(single, "train/loss"), rtol=2e-5)
