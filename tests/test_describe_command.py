"""`signscale describe` says what a model costs, and what stands in the way of saying it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import run
from tests.conftest import ROOT
from tests.publishing import publish
from trainer.checkpoint.manifest import MANIFEST, write_manifest
from trainer.errors import InputError
from trainer.models.build import build_model
from trainer.models.figures import Subject, measure
from trainer.recipe import ModelRecipe

SIZES = ["--feature_dim", "64", "--vocabulary", "50"]
STUDENT = ["--model", "student", "--width", "0.1", "--rnn_size", "12", "--seconds", "0.4"]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny student, after two steps."""
    return publish(tmp_path_factory.mktemp("describe") / "run", corpus, *STUDENT[:6])


def report(capsys: pytest.CaptureFixture[str], *flags: Any) -> dict[str, Any]:
    assert run(["describe", "--json", *map(str, flags)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(*flags: Any) -> str:
    with pytest.raises(InputError) as refused:
        run(["describe", *map(str, flags)])
    return str(refused.value)


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom launch.cli import run\n"
        "for command in ('describe', 'compare'):\n"
        "    try:\n        run([command, '--help'])\n    except SystemExit as end:\n        assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--checkpoint" in done.stdout
    assert "--target_ratio" in done.stdout


def test_operations_are_those_of_the_students_matrices_and_convolutions() -> None:
    dim, classes, frames, slot, units = 64, 51, 100, 104, 192
    model = build_model(ModelRecipe(model="student"), feature_dim=dim, num_classes=classes)
    [figures] = measure([Subject(model=model, frame_size=0)], seconds=4.0, fps=25.0, timed=False)
    channels, expected, length = 192, 2 * dim * 192 * frames, slot
    for block, kernel in enumerate((7, 5, 5, 5, 3, 3, 3)):
        wide = 2 * channels
        expected += 2 * length * channels * wide
        length //= 2 if block in (0, 3) else 1
        expected += 2 * length * (wide * kernel + wide * channels)
    outputs = frames // 4
    # Two directions of four gates over what the network in time and the postures say, and the last state.
    expected += 2 * outputs * 2 * 4 * units * (2 * channels + units)
    expected += 2 * outputs * 2 * units * classes
    assert figures.flops_per_second * 4 == expected
    assert figures.passes == ()
    assert figures.real_time_factor is None


def test_measuring_leaves_the_number_of_threads_as_it_was() -> None:
    model = build_model(ModelRecipe(model="student", width=0.1, rnn_size=4), feature_dim=8, num_classes=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        [figures] = measure([Subject(model=model, frame_size=0)], seconds=0.2, fps=25.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(figures.passes) >= 3
    assert min(figures.passes) <= figures.real_time_factor <= max(figures.passes)  # type: ignore[operator]


def test_a_recipe_is_described_by_the_sizes_given(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *STUDENT, *SIZES)
    model = build_model(ModelRecipe(model="student", width=0.1, rnn_size=12), feature_dim=64, num_classes=51)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (found["model"], found["total_stride"], found["vocabulary"]) == ("student", 4, 50)
    assert found["frame_shape"] == [64]
    assert found["step"] is None
    assert found["real_time_factor"] > 0
    slower = report(capsys, *STUDENT, *SIZES, "--total_stride", "1")
    assert slower["total_stride"] == 1
    assert slower["flops_per_second"] > found["flops_per_second"]


def test_a_model_of_video_is_described_by_its_vocabulary_alone(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "mobilenet_v3_small", "--width", "0.25", "--rnn_size", "8", "--vocabulary", "9"]
    found = report(capsys, *flags, "--frame_size", "64", "--seconds", "0.2", "--no-measure")
    assert found["frame_shape"] == [56, 56, 3]
    assert found["real_time_factor"] is None
    larger = report(capsys, *flags, "--frame_size", "128", "--seconds", "0.2", "--no-measure")
    assert larger["frame_shape"] == [112, 112, 3]
    assert larger["flops_per_second"] > 3 * found["flops_per_second"]


def test_a_corpus_says_the_sizes_itself(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *STUDENT, "--data_dir", corpus, "--no-measure")
    assert (found["frame_shape"], found["vocabulary"], found["source"]) == ([32], 8, str(corpus))


def test_a_run_is_described_by_its_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--checkpoint", trained, "--seconds", "0.4")
    assert (found["model"], found["step"], found["frame_shape"], found["vocabulary"]) == ("student", 2, [32], 8)
    assert run(["describe", "--checkpoint", str(trained), "--seconds", "0.4"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^parameters +[\d,]+ \(", said, re.MULTILINE)
    assert re.search(r"^operations +0\.\d+ GFLOP per second of video$", said, re.MULTILINE)
    assert re.search(r"^real-time factor +0\.\d+ \(median of \d+ passes", said, re.MULTILINE)
    assert "total stride      4 (6.25 output frames per second)" in said
    assert "vocabulary        8 glosses" in said


# Bad input.


def test_what_is_no_run_is_refused(trained: Path, tmp_path: Path) -> None:
    assert "expected a run directory or a checkpoint, found none" in refusal("--checkpoint", tmp_path / "none")
    empty = tmp_path / "started"
    empty.mkdir()
    (empty / "recipe.yaml").write_text("model: student\n")
    assert "expected a run directory or a checkpoint, found none" in refusal("--checkpoint", empty)
    assert "expected a run directory or a checkpoint, found none" in refusal("--checkpoint", empty / "recipe.yaml")


def test_a_checkpoint_of_another_kind_is_refused(trained: Path, tmp_path: Path) -> None:
    name = json.loads((trained / "checkpoints" / "last.json").read_text())["checkpoint"]
    shutil.copytree(trained / "checkpoints" / name, tmp_path / "other")
    # Sound to the byte, but its weights are not those of its recipe.
    recipe = tmp_path / "other" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("model: student", "model: teacher"))
    (tmp_path / "other" / MANIFEST).unlink()
    write_manifest(tmp_path / "other")
    assert "lacks inception" in refusal("--checkpoint", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"cut short")
    assert "the checkpoint is refused" in refusal("--checkpoint", tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (STUDENT, "--feature_dim and --vocabulary: not given"),
        ([*STUDENT, "--vocabulary", "5"], "--feature_dim: not given"),
        (["--model", "mobilenet_v3_small"], "--vocabulary: not given"),
        ([*STUDENT, "--vocabulary", "0", "--feature_dim", "3"], "expected a whole number of at least 1, found '0'"),
        ([*STUDENT, *SIZES, "--fps", "nan"], "expected a number above 0, found 'nan'"),
        ([*STUDENT, *SIZES, "--vocabulry", "3"], "unknown option --vocabulry; did you mean --vocabulary?"),
        ([*STUDENT, *SIZES, "--model", "pupil"], "pupil"),
        ([*STUDENT, *SIZES, "--dropout", "1.0"], "dropout: 1.0 leaves no signal"),
        ([*STUDENT, *SIZES, "--streams", "{pose: [0, 70]}"], r"pose takes \[0, 70\) but the corpus has D = 64"),
        ([*STUDENT, "--data_dir", "nowhere"], "nowhere: expected the corpus folder"),
        ([*STUDENT, *SIZES, "--data_dir", "x"], "--feature_dim: the corpus says it itself"),
        (["--checkpoint", "x", *STUDENT[:2]], "--model: a checkpoint says these itself"),
        (["--checkpoint", "x", *SIZES], "--feature_dim and --vocabulary: a checkpoint says these itself"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(flags: list[str], said: str) -> None:
    assert re.search(said.replace("?", r"\?"), refusal(*flags))


def test_a_bad_value_does_not_bring_up_the_corpus_that_the_sizes_stand_for() -> None:
    said = refusal(*STUDENT, *SIZES, "--width", "0")
    assert "width" in said
    assert "data_dir" not in said


def test_a_pass_of_the_head_warns_of_nothing() -> None:
    # A process of its own: torch gives this warning once.
    code = (
        "import numpy, torch\n"
        "from trainer.layout import lay_out\nfrom trainer.models.temporal_head import TemporalHead\n"
        "head = TemporalHead(3, rnn_size=2, rnn_layers=1, dropout=0.0, num_classes=2)\n"
        "assert head(torch.zeros(2, 3), lay_out(numpy.array([4]), 4)).logits.shape == (1, 2)\n"
        "assert torch.backends.mkldnn.enabled\n"
    )
    warned = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(warned, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
