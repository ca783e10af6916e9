"""From a teacher of video to its student: on two ranks from end to end, and along one curve on any number of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import column, launch
from tests.distributed.curves import check_one_curve
from tests.videos import synthesize
from trainer.softtargets.store import SoftTargets

COMMON = [
    *["--frame_size", "32", "--batch_size", "4", "--gradient_accumulation_steps", "1", "--warmup_epochs", "0"],
    *["--trackers", "[]", "--train_wer_clips", "0", "--log_every", "1", "--rnn_layers", "1", "--norm", "group"],
]
# A teacher of another stride than its students, so that its frames have to be laid over theirs.
TEACHER = [*COMMON, "--model", "i3d", "--width", "0.02", "--rnn_size", "16", "--total_stride", "2"]
STUDENT = [*COMMON, "--model", "mobilenet_v3_small", "--width", "0.2", "--rnn_size", "12", "--dropout", "0.3"]
TERMS = ("ctc_loss", "distillation_loss", "feature_loss", "visual_ctc_loss", "alignment_loss")
LOSSES = ("train/loss", "train/ctc_loss", "train/distillation_loss")


def train(world_size: int, corpus: Path, run: Path, *flags: str, steps: int) -> None:
    ends = ["--max_steps", str(steps), "--evaluate_every", str(steps)]
    launch(world_size, "trainer.train", ["--data_dir", str(corpus), "--output_dir", str(run), *flags, *ends])


def extract(world_size: int, teacher: Path, output: Path) -> None:
    flags = ["--shard_clips", "3", "--num_workers", "0", "--dtype", "float32"]
    launch(world_size, "trainer.extract", ["--checkpoint", str(teacher), "--output", str(output), *flags])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in PHOENIX-2014's layout, frames of 32x32 pixels."""
    return synthesize(tmp_path_factory.mktemp("videos") / "corpus", clips=8)


@pytest.fixture(scope="module")
def teacher(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An I3D that two ranks have taught a little, so that its distributions are not all alike."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(2, videos, run, *TEACHER, "--learning_rate", "1e-2", steps=4)
    return run


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its soft targets, extracted by two ranks."""
    folder = tmp_path_factory.mktemp("cache") / "train"
    extract(2, teacher, folder)
    return folder


def test_a_teacher_of_video_its_soft_targets_and_its_student_on_two_ranks(
    videos: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    stored = SoftTargets(cache)
    assert len(stored.places) == 8
    run, out = tmp_path / "run", tmp_path / "evaluation"
    train(2, videos, run, *STUDENT, "--soft_targets", str(cache), steps=2)
    loss, ctc, part = (np.array(column(run, name)) for name in LOSSES)
    assert len(loss) == 2
    np.testing.assert_allclose(loss, 0.7 * part + 0.3 * ctc, rtol=1e-6)
    assert part.min() > 0.01, "a teacher that adds nothing would agree with anything"
    facts = json.loads((run / "distillation.json").read_text())
    assert facts["wer"] == pytest.approx(column(teacher, "val/wer")[-1])
    launch(2, "trainer.evaluate", ["--checkpoint", str(run), "--split", "test", "--output_dir", str(out)])
    report = json.loads((out / "test.json").read_text())
    assert report["clips"] == 4
    assert report["wer"] > 0


@pytest.mark.slow
def test_online_and_cached_students_of_video_follow_one_curve_on_one_rank_and_on_two(
    videos: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    online, cached = ["--teacher", str(teacher)], ["--soft_targets", str(cache)]
    runs: list[Path] = []
    for world_size, source, budget in (
        (1, online, "100000"),
        (2, online, "60"),
        (1, cached, "60"),
        (2, cached, "100000"),
    ):
        run = tmp_path / f"{len(runs)}"
        train(world_size, videos, run, *STUDENT, *source, "--max_frames_per_microbatch", budget, steps=6)
        runs.append(run)
    for name in LOSSES:
        expected = column(runs[0], name)
        assert len(expected) == 6
        for run in runs[1:]:
            np.testing.assert_allclose(column(run, name), expected, rtol=1e-5, err_msg=f"{name} {run.name}")
    assert min(column(runs[0], "train/distillation_loss")) > 0.01
    facts = [json.loads((run / "distillation.json").read_text()) for run in runs]
    assert len({fact["teacher"] for fact in facts}) == 1


@pytest.mark.slow
def test_an_online_teacher_sees_the_clip_as_it_was_cut_and_coloured_on_any_number_of_ranks(
    videos: Path, teacher: Path, tmp_path: Path
) -> None:
    flags = ["--teacher", str(teacher), "--augment", "true", "--augment_flip", "true"]
    for world_size, budget in ((1, "100000"), (2, "60")):
        run = tmp_path / str(world_size)
        train(world_size, videos, run, *STUDENT, *flags, "--max_frames_per_microbatch", budget, steps=5)
    for name in LOSSES:
        np.testing.assert_allclose(column(tmp_path / "2", name), column(tmp_path / "1", name), rtol=2e-5)


@pytest.mark.parametrize("model", ["mobilenet_v3_small", pytest.param("i3d", marks=pytest.mark.slow)])
def test_all_terms_over_video_follow_one_curve_on_one_rank_and_on_two(
    videos: Path, teacher: Path, tmp_path: Path, model: str
) -> None:
    """The auxiliary classifier and the teacher's features, on augmented frames, cut in any way."""
    weights = dict(zip(TERMS, (0.3, 0.7, 1.5, 0.7, 2.0), strict=True))
    flags = ["--teacher", str(teacher), "--feature_weight", "1.5", "--distill_blank_weight", "0.4"]
    flags += ["--visual_ctc_weight", "0.7", "--alignment_weight", "2", "--alignment_temperature", "4"]
    flags += ["--augment", "true", "--augment_flip", "true", "--label_smoothing", "0.1"]
    # As in test_auxiliary_losses.py: nothing but their sums shows.
    flags += ["--optimizer", "sgd", "--learning_rate", "0.05"]
    flags += ["--model", model, "--width", "0.2" if model.startswith("mobilenet") else "0.02"]
    runs = []
    for world_size, budget in ((1, "100000"), (1, "60"), (2, "60")):
        runs.append(tmp_path / str(len(runs)))
        train(world_size, videos, runs[-1], *STUDENT, *flags, "--max_frames_per_microbatch", budget, steps=6)
    check_one_curve(runs, ("loss", *TERMS), steps=6)
    total = sum(weight * np.array(column(runs[0], f"train/{name}")) for name, weight in weights.items())
    np.testing.assert_allclose(column(runs[0], "train/loss"), total, rtol=1e-5)


@pytest.mark.slow
def test_soft_targets_of_video_are_the_same_bytes_from_any_number_of_ranks(
    teacher: Path, cache: Path, tmp_path: Path
) -> None:
    extract(1, teacher, tmp_path / "one")
    names = sorted(path.name for path in cache.iterdir())
    assert [(tmp_path / "one" / name).read_bytes() for name in names] == [(cache / name).read_bytes() for name in names]
    assert names == sorted(path.name for path in (tmp_path / "one").iterdir())
