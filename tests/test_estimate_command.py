"""`signscale estimate` says what a recipe needs, what fits, and what it cannot know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cli import run
from tests.conftest import ROOT
from tests.publishing import publish
from trainer.data.lengths import draw_phoenix_lengths
from trainer.errors import InputError
from trainer.memory import activations
from trainer.parsing import parse_recipe
from trainer.recipe import Recipe

MODEL = ["--width", "0.25", "--rnn_size", "64", "--feature_dim", "64", "--vocabulary", "50"]
SHAPE = {"feature_dim": 64, "num_classes": 51}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 500 training clips."""
    path = tmp_path_factory.mktemp("lengths") / "lengths.csv"
    rows = [f"train,{frames},{glosses}" for frames, glosses in zip(*draw_phoenix_lengths(500, 1), strict=True)]
    path.write_text("\n".join(["split,num_frames,num_glosses", *rows]) + "\n")
    return path


def recipe() -> Recipe:
    return parse_recipe(["--data_dir", "-", *MODEL[:4]])


def report(capsys: pytest.CaptureFixture[str], *flags: Any) -> dict[str, Any]:
    assert run(["estimate", "--json", *map(str, flags)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom launch.cli import run\n"
        "try:\n    run(['estimate', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--device_gb" in done.stdout


def test_rows_say_what_each_backend_needs(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--lengths", table, *MODEL, "--world_size", "1,4", "--device_gb", "8")
    rows = {(row["world_size"], row["backend"]): row for row in found["rows"]}
    weights = found["parameters"] * 4
    assert rows[1, "data parallel"]["parameters"] == rows[4, "data parallel"]["gradients"] == weights
    assert rows[4, "FSDP2"]["optimizer"] == pytest.approx(2 * weights / 4, rel=0.01)
    assert rows[4, "ZeRO-3, CPU offload"]["host"] > 0
    # Nothing is shared on one rank.
    assert (1, "ZeRO-2") not in rows
    plain = rows[1, "data parallel"]
    kept = plain["parameters"] + plain["gradients"] + plain["optimizer"]
    most = max(plain["activations"], plain["buffers_in_update"])
    assert plain["sum"] == pytest.approx(kept + most + plain["read_ahead"])
    assert found["recommendations"][0]["rung"] == "data parallel"


def test_a_smaller_device_is_a_lower_rung(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {on: activations.count_activations(recipe(), **SHAPE, checkpointing=on) for on in (False, True)}
    # The same model each time: counted once.
    monkeypatch.setattr(activations, "count_activations", lambda *a, checkpointing, **k: counted[checkpointing])
    flags = ["--lengths", table, *MODEL, "--batch_size", "32", "--world_size", "4"]
    whole = report(capsys, *flags, "--device_gb", "100")
    need = next(row["sum"] for row in whole["rows"] if row["backend"] == "data parallel") / 1e9
    order = ["data parallel", "smaller budget", "activation checkpointing", "ZeRO-2", "ZeRO-3", "CPU offload", None]
    rungs = []
    for share in (1.2, 0.8, 0.4, 0.2, 0.1, 0.01):
        chosen = report(capsys, *flags, "--device_gb", need * share)["recommendations"][0]
        rungs.append(order.index(chosen["rung"]))
        if chosen["rung"] == "smaller budget":
            assert whole["longest_clip"] <= chosen["max_frames_per_microbatch"] < whole["budget"]
    assert rungs == sorted(rungs)
    assert rungs[0] == 0
    assert 1 in rungs
    assert rungs[-1] == len(order) - 1


def test_zero2_saves_what_zero1_saves_and_the_table_says_why(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lengths", table, *MODEL, "--world_size", "4", "--no-measure"]
    found = report(capsys, *flags)
    first, second, third = (
        next(row for row in found["rows"] if row["backend"] == name) for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3")
    )
    assert {**second, "backend": "ZeRO-1"} == first
    assert third["gradients"] < second["gradients"] == found["parameters"] * 4
    assert run(["estimate", *map(str, flags)]) == 0
    assert "ZeRO-2 keeps the local gradient whole until the step" in capsys.readouterr().out


def test_cells_read_ahead_are_counted_by_what_reads_them(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(*flags: str) -> dict[str, Any]:
        found = report(capsys, "--lengths", table, *MODEL, "--no-measure", *flags)
        assert [row["backend"] for row in found["rows"] if "offload" in row["backend"]] == (
            [] if "cpu" in flags else ["ZeRO-2, CPU offload", "ZeRO-3, CPU offload", "FSDP2, CPU offload"]
        )
        plain: dict[str, Any] = found["rows"][0]
        assert plain["sum"] == pytest.approx(plain["parameters"] * 4 + plain["buffers_in_update"] + plain["read_ahead"])
        return plain

    gpu, two, none = row(), row("--device", "cpu"), row("--device", "cpu", "--num_workers", "0")
    assert row("--num_workers", "0")["read_ahead"] == gpu["read_ahead"] == 3 / 5 * two["read_ahead"]
    assert none["read_ahead"] == 2 / 5 * two["read_ahead"]
    # One tensor in turn against many at once.
    assert two["buffers_in_update"] < 0.5 * gpu["buffers_in_update"] == 0.5 * gpu["parameters"]
    assert row("--fused_optimizer", "true")["buffers_in_update"] == 0


def test_checkpointing_takes_less_per_frame(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, less = (
        report(capsys, "--lengths", table, *MODEL, "--activation_checkpointing", on)["measured"]
        for on in ("false", "true")
    )
    assert less["saved_per_slot"] < 0.5 * plain["saved_per_slot"]
    assert less["per_slot"] < plain["per_slot"]


def test_an_online_teacher_and_what_training_alone_needs_are_counted(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = ["--data_dir", corpus, "--model", "student", "--width", "0.1", "--rnn_size", "16", "--num_workers", "0"]
    alone = report(capsys, *student)
    teacher = publish(tmp_path / "teacher", corpus, "--width", "0.4", "--rnn_size", "64")
    taught = report(capsys, *student, "--teacher", teacher)
    weights = report(capsys, "--data_dir", corpus, "--width", "0.4", "--rnn_size", "64", "--no-measure")["parameters"]
    assert taught["teacher_bytes"] == 4 * weights > 4 * alone["parameters"]
    assert taught["parameters"] == alone["parameters"]
    rows = {name: found["rows"][0] for name, found in (("alone", alone), ("taught", taught))}
    # Its activations are those of one layer at a time, and yet more than this student's.
    assert rows["taught"]["activations"] > 1.2 * rows["alone"]["activations"]
    for row in rows.values():
        kept = row["parameters"] + row["gradients"] + row["optimizer"] + row["teacher"]
        assert row["sum"] == pytest.approx(kept + max(row["activations"], row["buffers_in_update"]) + row["read_ahead"])
    both = report(capsys, *student, "--teacher", teacher, "--visual_ctc_weight", "1", "--feature_weight", "1")
    # A classifier of the visual features, and a projection of 2 x 16 onto 2 x 64 of them.
    classes, visual = 9, both["auxiliary_parameters"] - (2 * 16 + 1) * 2 * 64
    assert visual > 0
    assert visual % classes == 0
    assert both["parameters"] == alone["parameters"] + both["auxiliary_parameters"]
    assert run(["estimate", *map(str, student), "--teacher", str(teacher), "--no-measure"]) == 0
    assert f"the teacher's weights take {4 * weights / 1e6:,.0f} MB of every rank" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected a run directory or a checkpoint"):
        run(["estimate", *map(str, student), "--teacher", str(tmp_path / "nowhere")])


def test_the_table_says_what_is_measured_and_what_is_not(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "--lengths", str(table), *MODEL, "--device_gb", "8"]) == 0
    shown = capsys.readouterr().out
    for text in ("data parallel", "counted in passes of this model", "estimated", "1 rank(s): data parallel"):
        assert text in shown
    assert run(["estimate", "--lengths", str(table), *MODEL, "--no-measure"]) == 0
    shown = capsys.readouterr().out
    assert "not measured" in shown
    assert "give --device_gb" in shown


def test_a_corpus_says_its_own_size(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--data_dir", corpus, "--width", "0.02", "--rnn_size", "12", "--no-measure")
    assert found["parameters"] > 0
    assert found["measured"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "TABLE"], "--feature_dim D and --vocabulary V"),
        (["--lengths", "TABLE", *MODEL, "--device_gb", "0"], "--device_gb"),
        (["--lengths", "TABLE", *MODEL, "--world_size", "0"], "--world_size"),
        (["--lengths", "TABLE", *MODEL, "--device_bg", "24"], "did you mean --device_gb?"),
        (["--lengths", "/nowhere.csv", *MODEL], "cannot be read"),
        (["--feature_dim", "3"], "give them with --lengths alone"),
        ([], "data_dir: not given"),
    ],
)
def test_mistakes_are_named(table: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        run(["estimate", *[str(table) if flag == "TABLE" else flag for flag in flags]])
