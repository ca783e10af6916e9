"""`signscale launch debug`: the smallest run there is, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.debug import tame
from launch.jobs.options import DebugOptions
from launch.jobs.place import understand
from tests.conftest import ROOT, TINY, environment, metrics
from trainer.job.directory import JobDirectory
from trainer.parsing import load_recipe
from trainer.recipe import Recipe, combination_problems

RECIPES = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith("pipeline")]
FAILING = """
def deep(secret):
    raise ZeroDivisionError("in the depths")

deep(42)
"""


def debug(folder: Path, *words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "launch", "debug", *words],
        cwd=folder,
        env=environment(),
        input=said,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_batches_of_each_phase_with_every_check_on(corpus: Path, tmp_path: Path) -> None:
    recipe = ["--batch_size", "3", "--gradient_accumulation_steps", "2", "--epochs", "50", "--output_dir", "run"]
    train = ["train", "--data_dir", str(corpus), *TINY, *recipe, "--trackers", "[tensorboard]"]
    done = debug(tmp_path, "--", *train)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run-debug"
    assert metrics(run)[-1]["step"] == 2
    assert "12 training and" in done.stdout
    word = JobDirectory.of(run).last_word()
    assert word is not None
    assert (word.word, word.step) == ("DONE", 2)
    assert not (tmp_path / "run").exists()
    stored = load_recipe(run / "recipe.yaml")
    assert stored.run.detect_anomaly
    assert stored.run.deterministic
    # Once more: from the beginning, and a mistake is told as always.
    bad = debug(tmp_path, "--", *train, "--skip_clips", "nobody")
    assert bad.returncode == 2
    assert "found nobody" in bad.stderr
    assert [attempt.word for attempt in JobDirectory.of(run).history()] == ["FAILED"]


def test_what_is_made_small_is_what_takes_time(tmp_path: Path) -> None:
    words = ["train", "--data_dir", "x", "--output_dir", str(tmp_path / "r"), "--compile", "true", "--num_workers", "4"]
    tamed = tame(understand([*words, "--resume", "auto"]), DebugOptions(batches=3))
    assert tamed.recipe is not None
    assert tamed.run == tmp_path / "r-debug"
    expected = {"max_steps": 3, "limit_clips": 48, "num_workers": 0, "compile": False, "resume": "", "trackers": []}
    assert {key: tamed.recipe[key] for key in expected} == expected


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_tried_out(config: Path) -> None:
    words = ["train", "--config", str(config)]
    if not load_recipe(config).corpus.data_dir:
        words += ["--data_dir", "x"]
    tamed = tame(understand(words), DebugOptions())
    assert tamed.recipe is not None
    assert combination_problems(Recipe.from_flat(dict(tamed.recipe))) == []


def test_break_enters_the_debugger_in_the_frame_that_failed(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = debug(tmp_path, "--break", "--run", "r", "--", "-m", "failing", said="p secret * 2\nq\n")
    assert done.returncode == 1
    assert "ZeroDivisionError: in the depths" in done.stderr
    assert "(Pdb) 84" in done.stdout
    word = JobDirectory.of(tmp_path / "r").last_word()
    assert word is not None
    assert (word.word, word.reason) == ("FAILED", "ZeroDivisionError: in the depths")


@pytest.mark.parametrize(("leave", "code", "word"), [("pass", 0, "DONE"), ("import sys; sys.exit(3)", 3, "FAILED")])
def test_a_module_of_ones_own_is_run_as_python_would(tmp_path: Path, leave: str, code: int, word: str) -> None:
    (tmp_path / "own.py").write_text(f"import json, sys\nprint(json.dumps([__name__, *sys.argv[1:]]))\n{leave}\n")
    done = debug(tmp_path, "--run", "r", "--", "-m", "own", "a b", "--c")
    assert done.returncode == code
    assert json.loads(done.stdout.splitlines()[-1]) == ["__main__", "a b", "--c"]
    assert [attempt.word for attempt in JobDirectory.of(tmp_path / "r").history()] == [word]


def test_a_folder_that_debugging_did_not_make_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run-debug").mkdir()
    (tmp_path / "run-debug" / "precious").write_text("x")
    done = debug(tmp_path, "--", "train", "--data_dir", str(corpus), *TINY, "--output_dir", "run")
    assert done.returncode == 2
    assert "no debugging run made it" in done.stderr
    assert (tmp_path / "run-debug" / "precious").exists()
