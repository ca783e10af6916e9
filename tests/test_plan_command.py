"""`signscale plan` says what training would do, for any corpus and any number of ranks, and what it cannot know."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import run
from launch.lengths import read_lengths
from launch.plan import make_plan
from tests.conftest import ROOT
from trainer.assembly import make_training_loader
from trainer.data.cost import COST_MODEL, CostModel
from trainer.data.lengths import draw_phoenix_lengths
from trainer.data.prepare import prepare_corpus
from trainer.errors import InputError
from trainer.models.build import build_model
from trainer.parsing import parse_recipe

MODEL = CostModel(per_slot=8e-4, per_walk=2e-3, per_cell=3e-2, samples=50, residual=0.09)
TEACHER = ["--width", "0.02", "--rnn_size", "12", "--rnn_layers", "1"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 2,000 training clips, and of a dev split that must not count."""
    path = tmp_path_factory.mktemp("lengths") / "lengths.csv"
    rows = [f"train,{frames},{glosses}" for frames, glosses in zip(*draw_phoenix_lengths(2000, 1), strict=True)]
    path.write_text("\n".join(["split,num_frames,num_glosses", *rows, "dev,100000,1"]) + "\n")
    return path


@pytest.fixture(scope="module")
def cost_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that holds a cost model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / COST_MODEL).write_text(json.dumps(MODEL.to_json()))
    return folder


def report(capsys: pytest.CaptureFixture[str], *flags: Any) -> dict[str, Any]:
    assert run(["plan", "--json", *map(str, flags)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def text(capsys: pytest.CaptureFixture[str], *flags: Any) -> str:
    assert run(["plan", *map(str, flags)]) == 0
    return capsys.readouterr().out


def test_help_answers_without_torch() -> None:
    for words in (["--help"], ["plan", "--help"]):
        code = (
            "import sys\nfrom launch.cli import run\n"
            f"try:\n    run({words!r})\nexcept SystemExit as end:\n    assert not end.code\n"
            "assert 'torch' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "plan" in done.stdout


def test_a_fixed_batch_on_too_many_ranks_is_shown_for_what_it_is(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, "--data_dir", corpus, "--world_size", "4,64")
    four, many = found["world_sizes"]
    assert (four["batch_clips"], four["idle_ranks"]) == (16, 0)
    assert (many["batch_clips"], many["idle_ranks"]) == (16, 48)
    assert many["scaling_efficiency"] < 0.25
    shown = text(capsys, "--data_dir", corpus, "--world_size", "64")
    assert "64 ranks: 48 of them idle, a step has 16 clips; use fewer ranks, or let the batch grow" in shown
    assert "64 ranks: more than the 40 training clips; training refuses to start" in shown


def test_the_batch_grows_with_the_ranks_where_asked(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--lengths", table, "--world_size", "1,8,32"]
    fixed = report(capsys, *asked, "--batch_size", "4", "--gradient_accumulation_steps", "3")
    linear = report(capsys, *asked, "--batch_scaling", "linear")
    scaled = report(capsys, *asked, "--clips_per_rank", "5")
    assert [row["batch_clips"] for row in fixed["world_sizes"]] == [12, 12, 12]
    assert [row["batch_clips"] for row in linear["world_sizes"]] == [16, 128, 512]
    assert [row["batch_clips"] for row in scaled["world_sizes"]] == [5, 40, 160]
    assert [row["steps_per_epoch"] for row in scaled["world_sizes"]] == [400, 50, 13]


def test_a_recipe_file_and_flags_mean_what_they_mean_in_training(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("batch_size: 3\ngradient_accumulation_steps: 1\nshuffle_window: 4\n")
    asked = ["--lengths", table, "--world_size", "1", "--config", tmp_path / "recipe.yaml"]
    found = report(capsys, *asked, "--total_stride=2")
    assert found["world_sizes"][0]["batch_clips"] == 3
    assert (found["shuffle_window"], found["total_stride"]) == (4, 2)
    longest = found["frames_longest"]
    assert found["frames_per_cell_at_most"] == 3 * (-(-longest // 2) * 2 + 4)
    small = report(capsys, *asked, "--max_frames_per_microbatch", "500")
    assert small["frames_per_cell_at_most"] == 500
    assert small["world_sizes"][0]["cells_per_rank"] > 1


def test_without_a_cost_model_there_are_no_times(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--lengths", table, "--world_size", "8", "--clips_per_rank", "8"]
    found = report(capsys, *asked)
    assert found["cost_model"] is None
    row = found["world_sizes"][0]
    assert row["step_seconds"] is None
    assert row["all_reduce_share"] is None
    assert row["scaling_efficiency"] == pytest.approx(1.0, abs=0.01)
    assert row["recommended_shuffle_window"] == 1
    assert "In frames only, without times: give --cost_model" in text(capsys, *asked)


def test_a_cost_model_gives_times(table: Path, cost_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--lengths", table, "--world_size", "8", "--clips_per_rank", "8"]
    by_run = report(capsys, *asked, "--cost_model", cost_run)
    by_file = report(capsys, *asked, "--cost_model", cost_run / COST_MODEL)
    assert by_run == by_file
    assert by_run["cost_model"]["per_walk"] == MODEL.per_walk
    row = by_run["world_sizes"][0]
    # Eight clips of 141 frames a rank, their guards, and a walk of some 55 output frames.
    assert row["step_seconds"] == pytest.approx(8e-4 * 8 * 146 + 2e-3 * 55 + 3e-2, rel=0.05)
    assert "Times by a cost model of 50 steps" in text(capsys, *asked, "--cost_model", cost_run)


def test_the_all_reduce_is_a_ring_over_all_parameters(
    corpus: Path, cost_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data_dir", corpus, "--world_size", "1,4", "--fabric_gbit", "0.001", *TEACHER]
    bare, timed = report(capsys, *asked), report(capsys, *asked, "--cost_model", cost_run)
    recipe = parse_recipe(["--data_dir", str(corpus), *TEACHER])
    lengths = read_lengths(recipe.corpus)
    assert (lengths.feature_dim, lengths.num_classes) == (32, 9)
    with torch.device("cpu"):
        model = build_model(recipe.model, feature_dim=32, num_classes=9)
    assert bare["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    alone, four = bare["world_sizes"]
    assert alone["all_reduce_seconds"] == 0.0
    assert four["all_reduce_seconds"] == pytest.approx(2 * 3 / 4 * 4 * bare["parameters"] * 8 / 1e6)
    assert four["all_reduce_share"] is None
    row = timed["world_sizes"][1]
    assert row["all_reduce_share"] == pytest.approx(row["all_reduce_seconds"] / row["step_seconds"])
    without = report(capsys, "--data_dir", corpus, "--world_size", "4", "--cost_model", cost_run)["world_sizes"][0]
    assert row["step_seconds"] == pytest.approx(without["step_seconds"] + row["all_reduce_seconds"])
    assert row["scaling_efficiency"] < without["scaling_efficiency"]


def test_what_a_rank_reads_is_its_part_of_the_files(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sum(path.stat().st_size for path in (corpus / "train").rglob("*.npz"))
    plain = report(capsys, "--data_dir", corpus, "--world_size", "4")["world_sizes"][0]
    assert plain["bytes_per_rank_and_epoch"] == round(files / 4)
    mixed = report(capsys, "--data_dir", corpus, "--world_size", "4", "--mixup_alpha", "0.4")["world_sizes"][0]
    assert plain["bytes_per_rank_and_epoch"] < mixed["bytes_per_rank_and_epoch"] <= round(files / 2)


def test_a_packed_corpus_gives_the_same_plan(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert run(["pack", str(corpus), str(packed)]) == 0
    capsys.readouterr()
    asked = ["--world_size", "2,8", "--augment", "true", "--fabric_gbit", "1", *TEACHER]
    found, expected = (report(capsys, "--data_dir", folder, *asked) for folder in (packed, corpus))
    for row in [*found["world_sizes"], *expected["world_sizes"]]:
        del row["bytes_per_rank_and_epoch"]
    del found["source"], expected["source"]
    assert found == expected


def test_clips_that_training_leaves_out_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.csv"
    # The third has five output frames at stride 4 for six glosses; the fourth needs one more for a blank.
    path.write_text(
        "split,num_frames,num_glosses,adjacent_repeats\ntrain,40,3,0\ntrain,80,3,1\ntrain,20,6,0\ntrain,20,5,1\n"
    )
    asked = ["--lengths", path, "--world_size", "1"]
    found = report(capsys, *asked)
    assert (found["clips"], found["infeasible_clips"], found["frames_mean"]) == (2, 2, 60.0)
    assert "2 more have fewer output frames than CTC needs" in text(capsys, *asked)
    assert report(capsys, *asked, "--total_stride", "2")["clips"] == 4


class Alone:
    """What preparing a corpus asks of the engine, for one process; a whole engine would change this one for good."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]

    def together(self, act: Callable[[], Any]) -> Any:
        return act()


def test_the_steps_are_those_of_the_training_loader(corpus: Path) -> None:
    flags = ["--augment", "true", "--shuffle_window", "2", "--mixup_alpha", "0.3", "--overfit_clips", "37"]
    recipe = parse_recipe(["--data_dir", str(corpus), *flags])
    prepared = prepare_corpus(recipe.corpus, recipe.model.total_stride, Alone(), print, known=None, checked="")
    trained = make_training_loader(recipe, prepared, Alone()).plan  # type: ignore[arg-type]
    shown = make_plan(recipe, read_lengths(recipe.corpus))
    for expected, found in zip(trained.batches(1, 16), shown.batches(1, 16), strict=True):
        assert found.clips.tolist() == expected.clips.tolist()
        assert found.num_frames.tolist() == expected.num_frames.tolist()
        assert found.partners.tolist() == expected.partners.tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world_size", "2"], "data_dir: not given"),
        (["--world_size", "0", "--data_dir", "x"], "at least 1, found '0'"),
        (["--world_size", "8,,64", "--data_dir", "x"], "at least 1, found ''"),
        (["--data_dir", "x"], "required: --world_size"),
        (["--world_size", "2", "--data_dir", "x", "--worldsize", "3"], r"--worldsize; did you mean --world_size\?"),
        (["--world_size", "2", "--data_dir", "x", "--batchsize", "3"], r"--batchsize; did you mean --batch_size\?"),
        (["--world_size", "2", "--data_dir", "x", "--batch_size", "-3"], "batch_size"),
        (["--world_size", "2", "--data_dir", "nowhere"], "nowhere: expected the corpus folder"),
        (["--world_size", "2", "--data_dir", "x", "--vocabulary", "3"], "give them with --lengths alone"),
        (["--world_size", "2", "--data_dir", "x", "--fabric_gbit", "nan"], "expected a number above 0, found 'nan'"),
        (["--world_size", "2", "--lengths", "no.csv"], "no.csv: cannot be read"),
        (["--world_size", "2", "--lengths", "TABLE", "--cost_model", "no.json"], "no.json: cost model cannot be read"),
        (["--world_size", "2", "--lengths", "TABLE", "--fabric_gbit", "10"], "give --feature_dim D and --vocabulary V"),
    ],
)
def test_mistakes_are_named_with_their_mend(table: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(["plan", *(str(table) if flag == "TABLE" else flag for flag in flags)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("split,frames\ntrain,10\n", "expected a CSV with the columns split, num_frames"),
        ("split,num_frames\ntrain,ten\n", "expected a CSV with the columns split, num_frames"),
        ("split,num_frames\ndev,10\n", "expected clips of split train, each with frames, found 0 clips"),
        ("split,num_frames\ntrain,10\ntrain,0\n", "found a clip with fewer than one frame"),
    ],
)
def test_a_table_that_is_none_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"lengths\.csv: .*{message}"):
        run(["plan", "--world_size", "2", "--lengths", str(path)])
