"""A teacher, or soft targets, that a student cannot learn from: one clear error, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY, reset_process
from tests.publishing import publish
from trainer.data.synthetic import SyntheticSpec, write_corpus
from trainer.errors import InputError
from trainer.extract import main as extract
from trainer.softtargets.store import MANIFEST, UNDER_WAY
from trainer.train import main as train

SHORT = [*TINY, "--max_steps", "1", "--num_workers", "0"]


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Undo what a run does to its process."""
    yield
    reset_process()


def make_corpus(folder: Path, seed: int, dim: int = 32, vocabulary: int = 8) -> Path:
    write_corpus(
        SyntheticSpec(clips=16, seed=seed, vocabulary_size=vocabulary, feature_dim=dim), folder, lambda text: None
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a teacher of a step and its soft targets."""
    folder = tmp_path_factory.mktemp("taught")
    make_corpus(folder / "corpus", 3)
    assert train(["--data_dir", str(folder / "corpus"), "--output_dir", str(folder / "teacher"), *SHORT]) == 0
    reset_process()
    assert extract(["--checkpoint", str(folder / "teacher"), "--output", str(folder / "targets")]) == 0
    reset_process()
    return folder


def refusal(folder: Path, run: Path, *flags: str, corpus: Path | None = None) -> str:
    with pytest.raises(InputError) as refused:
        train(["--data_dir", str(corpus or folder / "corpus"), "--output_dir", str(run), *SHORT, *flags])
    assert not run.exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--distill_temperature", "0"], "distill_temperature"),
        (["--distill_temperature", "-1"], "distill_temperature"),
        (["--distill_alpha", "1.5"], "distill_alpha"),
        (["--distill_alpha", "-0.1"], "distill_alpha"),
        (["--distill_temperature", "nan"], "distill_temperature"),
        (["--teacher", "a", "--soft_targets", "b"], "teacher and soft_targets: a student learns from one of them"),
        (
            ["--soft_targets", "b", "--augment", "true"],
            r"augment_rescale 0.2, augment_frame_drop 0.1 changes them; let the teacher .* \(--teacher RUN instead\)",
        ),
        (
            ["--soft_targets", "b", "--mixup_alpha", "0.2"],
            r"mixup_alpha 0.2 changes them; .* \(--teacher RUN instead\)",
        ),
        (["--feature_weight", "-0.1"], "feature_weight"),
        (["--visual_ctc_weight", "-1"], "visual_ctc_weight"),
        (["--alignment_weight", "-1"], "alignment_weight"),
        (["--alignment_temperature", "0"], "alignment_temperature"),
        (
            ["--feature_weight", "1"],
            "feature_weight: compares with a teacher's features, and none is named; add --teacher",
        ),
        (
            ["--soft_targets", "b", "--feature_weight", "1"],
            r"feature_weight: stored soft targets hold no features; let the teacher .* \(--teacher RUN instead of",
        ),
        (["--distill_labels", "teacher"], "distill_labels: teacher decodes nothing where none is named"),
        (
            ["--teacher", "a", "--distill_labels", "teacher", "--mixup_alpha", "0.2"],
            "distill_labels: teacher decodes a clip as one; set mixup_alpha to 0",
        ),
        (["--teacher", "nowhere"], "nowhere: expected a run directory or a checkpoint, found none"),
        (["--soft_targets", "nowhere"], "nowhere: expected soft targets, found no manifest.json; make them with"),
    ],
)
def test_what_no_teacher_can_mend(folder: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    assert re.search(said, refusal(folder, tmp_path / "run", *flags))


def test_masks_and_noise_leave_the_frames_in_place(folder: Path, tmp_path: Path) -> None:
    flags = ["--soft_targets", str(folder / "targets"), "--augment", "true"]
    still = ["--augment_rescale", "0", "--augment_frame_drop", "0"]
    assert (
        train(["--data_dir", str(folder / "corpus"), "--output_dir", str(tmp_path / "r"), *SHORT, *flags, *still]) == 0
    )


@pytest.mark.parametrize("source", ["teacher", "targets"])
def test_a_teacher_of_another_vocabulary(folder: Path, tmp_path: Path, source: str) -> None:
    other = make_corpus(tmp_path / "other", 3, vocabulary=5)
    flag = "--teacher" if source == "teacher" else "--soft_targets"
    said = refusal(folder, tmp_path / "run", flag, str(folder / source), corpus=other)
    assert "the teacher's vocabulary is not the student's" in said
    assert "the corpus does not have (" in said


def test_a_teacher_of_another_dimension_or_normalization(folder: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", str(folder / "teacher")]
    wide = make_corpus(tmp_path / "wide", 3, dim=40)
    said = refusal(folder, tmp_path / "run", *teacher, corpus=wide)
    assert "the teacher takes features of D = 32, the corpus has 40" in said
    said = refusal(folder, tmp_path / "run", *teacher, "--normalization", "none")
    assert "trained with normalization corpus, the student has none" in said


def test_a_student_takes_its_normalization_from_its_teacher(folder: Path, tmp_path: Path) -> None:
    from trainer.checkpoint.content import read_checkpoint
    from trainer.checkpoint.store import find_checkpoint

    # Fewer clips have other statistics; the student sees what its teacher sees.
    flags = ["--teacher", str(folder / "teacher"), "--overfit_clips", "5"]
    assert train(["--data_dir", str(folder / "corpus"), "--output_dir", str(tmp_path / "r"), *SHORT, *flags]) == 0
    ours, theirs = (read_checkpoint(find_checkpoint(run)).normalization for run in (tmp_path / "r", folder / "teacher"))
    assert (ours.mean == theirs.mean).all()
    assert (ours.scale == theirs.scale).all()


def test_soft_targets_of_another_corpus_or_of_cut_clips(folder: Path, tmp_path: Path) -> None:
    cached = ["--soft_targets", str(folder / "targets")]
    other = make_corpus(tmp_path / "other", 4)
    said = refusal(folder, tmp_path / "run", *cached, corpus=other)
    assert "these are the soft targets of another corpus or split" in said
    said = refusal(folder, tmp_path / "run", *cached, "--max_frames", "30")
    assert "clips cut by --max_frames count as others" in said
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    dev = ["--checkpoint", str(folder / "teacher"), "--split", "dev", "--output", str(tmp_path / "dev")]
    assert extract(dev) == 0
    assert "16 of 16 training clips have none" in refusal(
        folder, tmp_path / "run", "--soft_targets", str(tmp_path / "dev")
    )


def test_damaged_or_unfinished_soft_targets(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "targets"
    shutil.copytree(folder / "targets", broken)
    cached = ["--soft_targets", str(broken)]
    shard = broken / "shard-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{shard}: its checksum is not the one written with it" in refusal(folder, tmp_path / "run", *cached)
    shard.write_bytes(content[:-7])
    assert f"expected {len(content)} bytes, found {len(content) - 7}" in refusal(folder, tmp_path / "run", *cached)
    shard.write_bytes(content)
    manifest = json.loads((broken / MANIFEST).read_text())
    swapped = {**manifest, "glosses": manifest["glosses"][::-1]}
    (broken / MANIFEST).write_text(json.dumps(swapped))
    assert "or in another order" in refusal(folder, tmp_path / "run", *cached)
    (broken / MANIFEST).write_text("{")
    assert f"{broken / MANIFEST}: is damaged" in refusal(folder, tmp_path / "run", *cached)
    (broken / MANIFEST).unlink()
    (broken / UNDER_WAY).write_text("{}")
    assert "the extraction of these soft targets has not ended" in refusal(folder, tmp_path / "run", *cached)


def test_a_copied_checkpoint_goes_on_only_with_a_teacher_whose_features_have_the_same_size(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Away from its run nothing says who its teacher was: only the projection onto that one's features does."""
    sizes = {"small": "10", "equal": "12", "large": "14"}
    for name, size in sizes.items():
        publish(tmp_path / name, folder / "corpus", *TINY, "--rnn_size", size)
    flags = ["--normalization", "none", "--feature_weight", "0.5", "--warmup_epochs", "0"]
    flags += ["--max_steps", "2", "--stop_after_steps", "1"]
    common = ["--data_dir", str(folder / "corpus"), *SHORT, *flags]
    for name in ("small", "equal"):
        run = tmp_path / f"taught_{name}"
        assert train([*common, "--teacher", str(tmp_path / name), "--output_dir", str(run)]) == 0
        reset_process()
        shutil.copytree(run / "checkpoints" / "step-000000001", tmp_path / "copied" / name)
    projection = "head.auxiliary.projection.weight"
    for began, now, shapes in (
        ("small", "large", "[20, 24] there and [28, 24] with"),
        ("small", "equal", "[20, 24] there and absent with"),
        ("equal", "small", "absent there and [20, 24] with"),
    ):
        copied = tmp_path / "copied" / began
        going_on = [*flags, "--resume", str(copied), "--teacher", str(tmp_path / now)]
        said = refusal(folder, tmp_path / "run", *going_on)
        reset_process()
        assert f"{copied}: " in said
        assert f"{projection} is {shapes} this teacher" in said
        assert "--teacher of the one it began with, or start a new --output_dir with --init_from" in said
        assert "step 1/" not in capfd.readouterr().out
    # The first mend that is named, and the second.
    ends = ["--output_dir", str(tmp_path / "on")]
    copied = tmp_path / "copied" / "small"
    assert train([*common, *ends, "--resume", str(copied), "--teacher", str(tmp_path / "small")]) == 0
    reset_process()
    ends = ["--output_dir", str(tmp_path / "anew")]
    assert train([*common, *ends, "--init_from", str(copied), "--teacher", str(tmp_path / "large")]) == 0
    assert f"{projection}, head.auxiliary.projection.bias: for training alone, started fresh" in capfd.readouterr().out


def test_a_damaged_teacher(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    [weights] = (tmp_path / "teacher").glob("checkpoints/step-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-3])
    said = refusal(folder, tmp_path / "run", "--teacher", str(tmp_path / "teacher"))
    assert f"{weights}: has" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", "0"], "--temperature 0.0: expected a number above 0"),
        (["--top_k", "-1"], "--top_k -1: expected 0 or more"),
        (["--top_k", "9"], "--top_k 9: the teacher has 9 classes; choose fewer"),
        (["--shard_clips", "0"], "--shard_clips 0: expected 1 or more"),
        (["--splitt", "train"], "unknown option --splitt; did you mean --split?"),
        (["--split", "nowhere"], "nowhere"),
    ],
)
def test_an_extraction_that_cannot_be(folder: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        extract(["--checkpoint", str(folder / "teacher"), "--output", str(tmp_path / "out"), *flags])
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_the_soft_targets_of_another_teacher(folder: Path, tmp_path: Path) -> None:
    flags = ["--data_dir", str(folder / "corpus"), *SHORT, "--seed", "1"]
    assert train([*flags, "--output_dir", str(tmp_path / "other")]) == 0
    reset_process()
    before = (folder / "targets" / MANIFEST).read_bytes()
    with pytest.raises(InputError) as refused:
        extract(["--checkpoint", str(tmp_path / "other"), "--output", str(folder / "targets")])
    assert f"{folder / 'targets'}: holds soft targets of another teacher" in str(refused.value)
    reset_process()
    with pytest.raises(InputError) as refused:
        extract(["--checkpoint", str(folder / "teacher"), "--output", str(folder / "targets"), "--top_k", "2"])
    assert "top_k 0 instead of 2" in str(refused.value)
    reset_process()
    with pytest.raises(InputError) as refused:
        extract(["--checkpoint", str(folder / "teacher"), "--output", str(folder / "teacher")])
    assert "holds something else than soft targets" in str(refused.value)
    assert (folder / "targets" / MANIFEST).read_bytes() == before
