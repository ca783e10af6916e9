"""Training and evaluation from frames keep the promise that they keep from features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import column, launch
from tests.videos import synthesize

STEPS = 5
TINY = [
    *["--model", "mobilenet_v3_small", "--width", "0.2", "--rnn_size", "12", "--rnn_layers", "1"],
    *["--frame_size", "32", "--batch_size", "4", "--gradient_accumulation_steps", "1", "--warmup_epochs", "0"],
    *["--trackers", "[]", "--train_wer_clips", "0", "--log_every", "1", "--evaluate_every", str(STEPS)],
    *["--augment", "true", "--augment_flip", "true", "--max_steps", str(STEPS)],
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in PHOENIX-2014's layout, frames of 32x32 pixels."""
    return synthesize(tmp_path_factory.mktemp("videos") / "corpus", clips=10)


@pytest.fixture(scope="module")
def single(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, a global batch in one micro-batch."""
    run = tmp_path_factory.mktemp("single") / "run"
    train(1, videos, run, "--max_frames_per_microbatch", "100000")
    return run


def train(world_size: int, corpus: Path, run: Path, *flags: str) -> None:
    launch(world_size, "trainer.train", ["--data_dir", str(corpus), "--output_dir", str(run), *TINY, *flags])


def test_two_ranks_follow_the_curve_of_one(videos: Path, single: Path, tmp_path: Path) -> None:
    train(2, videos, tmp_path / "run", "--max_frames_per_microbatch", "60")
    for name, tolerance in (("train/loss", 1e-5), ("train/grad_norm", 1e-3)):
        expected, found = column(single, name), column(tmp_path / "run", name)
        assert len(expected) == STEPS
        np.testing.assert_allclose(found, expected, rtol=tolerance)
    assert column(tmp_path / "run", "val/wer") == column(single, "val/wer")


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_weights(videos: Path, single: Path, tmp_path: Path) -> None:
    budget = ["--max_frames_per_microbatch", "100000", "--norm", "group"]
    train(1, videos, tmp_path / "run", *budget, "--stop_after_steps", "2")
    train(1, videos, tmp_path / "run", *budget, "--resume", "auto")

    def weights(run: Path) -> dict[str, np.ndarray]:
        name = json.loads((run / "checkpoints" / "last.json").read_text())["checkpoint"]
        return load_file(run / "checkpoints" / name / "model.safetensors")

    expected, found = weights(single), weights(tmp_path / "run")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_evaluation_is_the_same_on_two_ranks(single: Path, tmp_path: Path) -> None:
    reports = []
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        launch(
            world_size, "trainer.evaluate", ["--checkpoint", str(single), "--split", "test", "--output_dir", str(out)]
        )
        reports.append(((out / "test.json").read_text(), (out / "test.ctm").read_text()))
    assert reports[0][1] == reports[1][1]
    assert json.loads(reports[0][0])["wer"] == json.loads(reports[1][0])["wer"]
    assert json.loads(reports[0][0])["clips"] == 4


def test_a_truncated_frame_ends_the_run_before_training(videos: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "corpus"
    shutil.copytree(videos, spoilt)
    frame = sorted((spoilt / "features" / "fullFrame-32x32px" / "train" / "train-000004" / "1").iterdir())[3]
    frame.write_bytes(frame.read_bytes()[:200])
    flags = ["--data_dir", str(spoilt), "--output_dir", str(tmp_path / "run"), *TINY]
    done = launch(2, "trainer.train", flags, check=False)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {frame}: the PNG file is cut short") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("model", "of"), [("teacher", "videos"), ("mobilenet_v3_small", "corpus")])
def test_a_model_of_the_other_kind_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, of: str
) -> None:
    data_dir = request.getfixturevalue(of)
    flags = ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run"), "--model", model]
    done = launch(1, "trainer.train", flags, check=False)
    assert done.returncode == 2
    kinds = ("video", "features") if of == "videos" else ("features", "video")
    assert f"error: {data_dir}: holds {kinds[0]}, the model takes {kinds[1]}" in done.stderr
    assert "Traceback" not in done.stderr
