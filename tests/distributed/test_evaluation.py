"""The word error rate counts each clip once, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import jiwer
import pytest

from launch.score import main as score
from tests.conftest import launch, train

COUNTS = ["substitutions", "deletions", "insertions", "reference_words", "clips", "wer", "empty_hypotheses"]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt something, so that hypotheses are not all empty."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    flags = ["--max_steps", "60", "--learning_rate", "1e-2", "--warmup_epochs", "0", "--batch_size", "8"]
    train(2, corpus, folder, *flags, "--gradient_accumulation_steps", "1", "--width", "0.05", "--rnn_size", "48")
    return folder


def test_counts_are_the_same_on_one_two_and_three_ranks_and_equal_jiwer_on_the_files(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for world_size in (1, 2, 3):
        out = tmp_path / str(world_size)
        flags = ["--checkpoint", run, "--split", "train", "--output_dir", out, "--max_frames_per_microbatch", "120"]
        launch(world_size, "trainer.evaluate", [str(flag) for flag in flags])
        reports.append(json.loads((out / "train.json").read_text()))
    assert reports[0]["clips"] == 40
    assert reports[0]["substitutions"] + reports[0]["insertions"] + reports[0]["deletions"] > 0
    for report in reports[1:]:
        assert {name: report[name] for name in COUNTS} == {name: reports[0][name] for name in COUNTS}
    for name in ("train.ctm", "train.stm"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()

    # The files alone, read with nothing of this project, and jiwer itself.
    references = {}
    for line in (tmp_path / "3" / "train.stm").read_text().splitlines():
        clip, _, _, _, _, *glosses = line.split()
        references[clip] = " ".join(glosses)
    hypotheses = dict.fromkeys(references, "")
    for line in (tmp_path / "3" / "train.ctm").read_text().splitlines():
        if not line.startswith(";;"):
            clip, _, _, _, gloss = line.split()
            hypotheses[clip] = f"{hypotheses[clip]} {gloss}".strip()
    measured = jiwer.process_words(list(references.values()), [hypotheses[clip] for clip in references])
    assert [measured.substitutions, measured.deletions, measured.insertions] == [
        reports[2][name] for name in ("substitutions", "deletions", "insertions")
    ]

    # And the project's own command on the files.
    files = ["--reference", str(tmp_path / "2" / "train.stm"), "--hypothesis", str(tmp_path / "2" / "train.ctm")]
    assert score([*files, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert {name: scored[name] for name in COUNTS} == {name: reports[1][name] for name in COUNTS}


def test_evaluation_needs_nothing_but_the_checkpoint(run: Path, tmp_path: Path) -> None:
    """A checkpoint that was copied away from its run brings vocabulary, normalisation and recipe along."""
    best = json.loads((run / "checkpoints" / "best.json").read_text())["checkpoint"]
    copied = tmp_path / "taken" / "along"
    copied.parent.mkdir()
    (run / "checkpoints" / best).rename(copied)
    try:
        launch(1, "trainer.evaluate", ["--checkpoint", str(copied), "--split", "dev"])
    finally:
        copied.rename(run / "checkpoints" / best)
    assert json.loads((tmp_path / "taken" / "evaluation" / "dev.json").read_text())["clips"] == 5
