"""`signscale compare` puts runs side by side, only where their figures compare, and says who met the target."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cli import run
from tests.conftest import reset_process
from tests.publishing import publish
from trainer.errors import InputError
from trainer.evaluate import main as evaluate

SMALL = ["--width", "0.05", "--rnn_size", "12", "--rnn_layers", "1"]
QUICK = ["--seconds", "0.4"]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A teacher and a student, evaluated on two splits by the real command."""
    folder = tmp_path_factory.mktemp("compare")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    found = (
        publish(folder / "teacher", corpus, "--model", "teacher", "--width", "0.1", "--rnn_size", "24"),
        publish(folder / "student", corpus, "--model", "student", *SMALL),
    )
    for path in found:
        for split in ("dev", "test"):
            assert evaluate(["--checkpoint", str(path), "--split", split, "--num_workers", "0"]) == 0
    yield found
    # What an evaluation does to its process is undone.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    reset_process()


@pytest.fixture
def copies(runs: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both runs, to change."""
    teacher, student = (Path(shutil.copytree(path, tmp_path / path.name)) for path in runs)
    return teacher, student


def report(capsys: pytest.CaptureFixture[str], *flags: Any, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["compare", "--json", *QUICK, *map(str, flags)]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(*flags: Any) -> list[str]:
    with pytest.raises(InputError) as refused:
        run(["compare", *QUICK, *map(str, flags)])
    return list(refused.value.problems)


def amend(path: Path, split: str, **changes: Any) -> None:
    file = path / "evaluation" / f"{split}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_runs_are_put_side_by_side(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *runs)
    teacher, student = found["runs"]
    for path, row in zip(runs, (teacher, student), strict=True):
        evaluated = {s: json.loads((path / "evaluation" / f"{s}.json").read_text())["wer"] for s in ("dev", "test")}
        assert row["run"] == str(path)
        assert row["wer"] == evaluated
        assert row["real_time_factor"] > 0
    assert (teacher["model"], student["model"]) == ("teacher", "student")
    assert student["parameters"] < teacher["parameters"]
    assert student["flops_per_second"] < teacher["flops_per_second"]
    assert found["target_wer"] == {split: 1.1 * wer for split, wer in teacher["wer"].items()}
    assert teacher["target_met"] == {}
    assert found["notes"] == []


@pytest.mark.parametrize(("wer", "dev", "code"), [(11.0, True, 0), (11.01, False, 1)])
def test_the_target_is_judged_split_by_split(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str], wer: float, dev: bool, code: int
) -> None:
    teacher, student = copies
    amend(teacher, "dev", wer=10.0)
    amend(teacher, "test", wer=20.0)
    amend(student, "dev", wer=wer)
    amend(student, "test", wer=0.0)
    found = report(capsys, teacher, student, "--require_target", "--no-measure", code=code)
    assert found["runs"][1]["target_met"] == {"dev": dev, "test": True}
    # Not asked for, a target that is missed is no failure.
    report(capsys, teacher, student, "--no-measure")
    looser = report(capsys, teacher, student, "--require_target", "--target_ratio", "1.2", "--no-measure")
    assert looser["runs"][1]["target_met"] == {"dev": True, "test": True}
    assert run(["compare", "--no-measure", str(teacher), str(student)]) == 0
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if line.startswith(str(student))]
    assert line.split()[-2:] == ["met" if dev else "missed", "met"]
    assert "dev 11.00 %, test 22.00 %" in said


def test_one_split_alone_may_be_asked_for(copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for path in copies:
        (path / "evaluation" / "dev.json").unlink()
    found = report(capsys, *copies, "--split", "test", "--no-measure")
    assert list(found["target_wer"]) == ["test"]


def test_without_reference_words_there_is_no_verdict(
    copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in copies:
        amend(path, "dev", wer=None)
    found = report(capsys, *copies, "--no-measure", "--require_target", "--target_ratio", "1000")
    assert found["runs"][1]["target_met"]["dev"] is None


def test_an_evaluation_of_older_weights_is_pointed_out(
    corpus: Path, copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = copies
    publish(student, corpus, "--model", "student", *SMALL, step=7)
    found = report(capsys, teacher, student, "--no-measure", "--split", "dev")
    [note] = found["notes"]
    assert "dev was evaluated at step 2, but the run's best checkpoint is now that of step 7" in note


# Bad input.


def test_every_run_that_cannot_be_compared_is_named_at_once(copies: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = copies
    (student / "evaluation" / "test.json").unlink()
    (teacher / "evaluation" / "dev.json").write_text("[]")
    missing, broken, unevaluated = sorted(refusal(tmp_path / "none", teacher, student))
    assert f"{tmp_path / 'none'}: expected a run directory, found none" in missing
    assert "student/evaluation/test.json: the run was not evaluated on test" in broken
    assert f"`signscale evaluate --checkpoint {student} --split test`" in broken
    assert "teacher/evaluation/dev.json: expected what signscale evaluate writes" in unevaluated


def test_a_run_without_a_checkpoint_is_named(copies: tuple[Path, Path]) -> None:
    teacher, student = copies
    shutil.rmtree(student / "checkpoints")
    [problem] = refusal(teacher, student)
    assert f"{student}: expected a run directory or a checkpoint, found none" in problem


@pytest.mark.parametrize(
    "change",
    [{"protocol": "phoenix2014"}, {"decoder": "best path", "beam_width": 1}, {"clips": 1}, {"reference_words": 3}],
)
def test_word_error_rates_that_do_not_compare_are_refused(copies: tuple[Path, Path], change: dict[str, Any]) -> None:
    teacher, student = copies
    amend(student, "test", **change)
    problems = refusal(teacher, student)
    assert len(problems) == len(change)
    for name, value in change.items():
        assert any(f"{student}: test was evaluated with {name} {value!r}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["a"], "expected two runs or more to compare, found one"),
        (["a", "a"], "a: is named twice"),
        (["a", "b", "--split", "dev", "dev"], "dev: is named twice"),
        (["a", "b", "--target_ratio", "0"], "--target_ratio 0.0: expected a number above 0"),
        (["a", "b", "--target_ratio", "nan"], "--target_ratio nan: expected a number above 0"),
        (["a", "b", "--spilt", "dev"], "unknown option --spilt; did you mean --split?"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(flags: list[str], said: str) -> None:
    assert said in "\n".join(refusal(*flags))
