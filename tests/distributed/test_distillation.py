"""Distillation follows one curve on any number of ranks, and the same one from a teacher as from its soft targets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, column, command, environment, launch, train
from tests.distributed import backends
from trainer.softtargets.store import MANIFEST, SoftTargets

STUDENT = [
    *["--max_steps", "10", "--evaluate_every", "10", "--log_every", "1", "--gradient_accumulation_steps", "1"],
    *["--warmup_epochs", "0", "--learning_rate", "1e-3", "--batch_size", "6"],
]
WHOLE = ["--augment", "true", "--mixup_alpha", "0.4", "--distill_blank_weight", "0.3", "--dropout", "0.3"]
SHARDS = ["--shard_clips", "3", "--num_workers", "0"]


def teach(corpus: Path, run: Path, *flags: str) -> Path:
    """Train a teacher that has learnt a little, so that its distributions are not all alike."""
    common = ["--max_steps", "40", "--evaluate_every", "40", "--learning_rate", "1e-2", "--warmup_epochs", "0"]
    shape = ["--width", "0.04", "--rnn_size", "32", "--batch_size", "8", "--gradient_accumulation_steps", "1"]
    train(1, corpus, run, *common, *shape, *flags)
    return run


def extract(world_size: int, teacher: Path, output: Path, *flags: str) -> str:
    arguments = ["--checkpoint", str(teacher), "--output", str(output), *SHARDS, *flags]
    return str(launch(world_size, "trainer.extract", arguments).stdout)


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another stride than its students, so that its frames have to be laid over theirs."""
    return teach(corpus, tmp_path_factory.mktemp("teacher") / "run", "--total_stride", "2")


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its soft targets in full precision, written by two ranks."""
    folder = tmp_path_factory.mktemp("cache") / "train"
    extract(2, teacher, folder, "--dtype", "float32")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("stride", "labels"), [("4", "teacher"), pytest.param("1", "annotations", marks=pytest.mark.slow)]
)
def test_a_teacher_and_its_soft_targets_give_the_same_loss_on_one_rank_and_on_two(
    corpus: Path, tmp_path: Path, teacher: Path, cache: Path, stride: str, labels: str
) -> None:
    runs: list[Path] = []
    for world_size, source, budget in (
        (1, ["--teacher", str(teacher)], "100000"),
        (2, ["--teacher", str(teacher)], "1"),
        (1, ["--soft_targets", str(cache)], "150"),
        (2, ["--soft_targets", str(cache)], "100000"),
    ):
        run = tmp_path / f"{len(runs)}"
        shape = ["--total_stride", stride, "--distill_labels", labels]
        train(world_size, corpus, run, *STUDENT, *source, *shape, "--max_frames_per_microbatch", budget)
        runs.append(run)
    for name in ("train/loss", "train/ctc_loss", "train/distillation_loss"):
        expected = column(runs[0], name)
        assert len(expected) == 10
        for run in runs[1:]:
            np.testing.assert_allclose(column(run, name), expected, rtol=1e-5)
    loss, ctc, part = (column(runs[0], f"train/{name}") for name in ("loss", "ctc_loss", "distillation_loss"))
    np.testing.assert_allclose(loss, 0.7 * np.array(part) + 0.3 * np.array(ctc), rtol=1e-6)
    assert min(part) > 0.01, "a teacher that adds nothing would agree with anything"
    facts = [json.loads((run / "distillation.json").read_text()) for run in runs]
    assert len({fact["teacher"] for fact in facts}) == 1
    assert len({fact["wer"] for fact in facts}) == 1


def test_a_teacher_sees_the_clip_as_it_was_augmented_and_mixed_on_any_number_of_ranks(
    corpus: Path, tmp_path: Path, teacher: Path
) -> None:
    for world_size, budget in ((1, "100000"), (2, "150")):
        run = tmp_path / str(world_size)
        source = ["--teacher", str(teacher), "--max_frames_per_microbatch", budget]
        train(world_size, corpus, run, *STUDENT, *WHOLE, *source)
    np.testing.assert_allclose(column(tmp_path / "2", "train/loss"), column(tmp_path / "1", "train/loss"), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_a_teacher_stays_whole_beside_a_student_in_parts(
    corpus: Path, tmp_path: Path, teacher: Path, backend: str
) -> None:
    flags = [*STUDENT, "--max_steps", "5", "--teacher", str(teacher)]
    train(1, corpus, tmp_path / "whole", *flags)
    backends.run(backend, 2, corpus, tmp_path / "parts", *flags)
    for name in ("train/loss", "train/distillation_loss"):
        np.testing.assert_allclose(column(tmp_path / "parts", name), column(tmp_path / "whole", name), rtol=2e-5)


def test_without_the_teacher_part_the_curve_is_that_of_ctc_alone(corpus: Path, tmp_path: Path, teacher: Path) -> None:
    train(1, corpus, tmp_path / "alone", *STUDENT)
    train(1, corpus, tmp_path / "taught", *STUDENT, "--teacher", str(teacher), "--distill_alpha", "0")
    assert column(tmp_path / "taught", "train/loss") == column(tmp_path / "alone", "train/loss")
    assert "train/ctc_loss" not in json.loads((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()[-1])


def test_soft_targets_are_the_same_bytes_from_any_number_of_ranks(teacher: Path, cache: Path, tmp_path: Path) -> None:
    said = extract(3, teacher, tmp_path / "three", "--dtype", "float32")
    assert files(tmp_path / "three") == files(cache)
    assert "40 clips" in said
    stored = SoftTargets(cache)
    assert len(stored.places) == 40
    # float32 against the two others: the error of what is written is none, that of float16 is small and told.
    sums = [shard.errors for shard in stored.shards]
    assert all(part["float32"] == (0.0, 0.0) and 0 < part["float16"][0] < 1e-3 for part in sums)


def test_an_extraction_that_was_killed_goes_on_on_other_ranks_and_ends_in_the_same_bytes(
    corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    flags = ["--dtype", "float16", "--top_k", "3", "--shard_clips", "1"]
    extract(1, teacher, tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    arguments = ["--checkpoint", str(teacher), "--output", str(out), *SHARDS, *flags]
    process = subprocess.Popen(
        command(2, "trainer.extract", arguments),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("shard-*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / MANIFEST).exists(), "met too late: it had ended"
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
    assert 0 < len(done) < 40
    # A shard that the kill cut short, as a crash of the machine would: its note is there, its bytes are not.
    cut = sorted(out.glob("shard-*.json"))[0].with_suffix(".safetensors")
    cut.write_bytes(cut.read_bytes()[:100])
    said = extract(3, teacher, out, *flags)
    assert "shards are there already; going on" in said
    assert files(out) == files(tmp_path / "whole")
    kept = [name for name in done if (out / name).stat().st_mtime_ns == done[name] and name != cut.name]
    assert len(kept) >= 2, "what was complete is not made again"
    # Once more: nothing is left to do, and nothing changes.
    assert "is complete already" in extract(1, teacher, out, *flags)
    assert files(out) == files(tmp_path / "whole")


def test_a_student_resumes_with_the_teacher_it_began_with_and_with_no_other(
    corpus: Path, tmp_path: Path, teacher: Path, cache: Path
) -> None:
    source = ["--teacher", str(teacher)]
    train(1, corpus, tmp_path / "whole", *STUDENT, *source)
    train(1, corpus, tmp_path / "run", *STUDENT, *source, "--stop_after_steps", "4")
    # A copied checkpoint of the same bytes is the same teacher; and its soft targets are.
    shutil.copytree(teacher / "checkpoints", tmp_path / "copied" / "checkpoints")
    moved = ["--teacher", str(tmp_path / "copied"), "--resume", "auto", "--stop_after_steps", "3"]
    train(2, corpus, tmp_path / "run", *STUDENT, *moved)
    other = teach(corpus, tmp_path / "other", "--seed", "5", "--max_steps", "2")
    for flags, why in (
        (["--teacher", str(other)], "is another one"),
        ([], "no teacher is named now"),
    ):
        refused = train(1, corpus, tmp_path / "run", *STUDENT, *flags, "--resume", "auto", check=False)
        assert refused.returncode == 2
        assert why in refused.stderr
    # Nor from its checkpoint in another folder; and a run without a teacher gets none in mid-course.
    elsewhere = ["--resume", str(tmp_path / "run"), "--teacher", str(other)]
    refused = train(1, corpus, tmp_path / "elsewhere", *STUDENT, *elsewhere, check=False)
    assert refused.returncode == 2
    assert "is another one" in refused.stderr
    assert not (tmp_path / "elsewhere").exists()
    train(1, corpus, tmp_path / "alone", *STUDENT, "--stop_after_steps", "1")
    refused = train(1, corpus, tmp_path / "alone", *STUDENT, "--resume", "auto", *source, check=False)
    assert refused.returncode == 2
    assert "the run has no teacher, but one is named now" in refused.stderr
    train(1, corpus, tmp_path / "run", *STUDENT, "--soft_targets", str(cache), "--resume", "auto")
    np.testing.assert_allclose(
        column(tmp_path / "run", "train/loss"), column(tmp_path / "whole", "train/loss"), rtol=1e-5
    )


def test_the_end_of_a_run_says_whether_the_student_came_close_enough(
    corpus: Path, tmp_path: Path, teacher: Path
) -> None:
    flags = [*STUDENT, "--max_steps", "1", "--teacher", str(teacher)]
    for ratio, verdict in (("1000", " met with"), ("0.001", "NOT met with")):
        said = train(1, corpus, tmp_path / ratio, *flags, "--target_ratio", ratio).stdout
        assert verdict in said.splitlines()[-1]
