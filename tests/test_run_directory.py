"""The run directory: one recipe owns it, another is told every difference, and it says what made it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.errors import InputError
from trainer.parsing import load_recipe
from trainer.recipe import FREE_ON_RESUME, CorpusRecipe, ModelRecipe, Recipe, RunRecipe
from trainer.run_directory import check_same_recipe, claim, describe_environment, record

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(
        corpus=CorpusRecipe(data_dir="corpus"),
        model=ModelRecipe(streams={"pose": [0, 3]}),
        run=RunRecipe(output_dir=str(tmp_path / "runs" / "teacher")),
    )


def change(recipe: Recipe, **values: Any) -> Recipe:
    return Recipe.from_flat({**recipe.flat(), **values})


def another(value: Any, name: str) -> Any:
    """Return another value of a field, of the same kind."""
    special = {
        "betas": (0.5, 0.6),
        "model": "student",
        "trackers": ["wandb"],
        "streams": {"face": [0, 9]},
        "target_wer": 5.0,
    }
    if name in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}-other"


def test_a_new_folder_is_free_and_checking_it_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    assert claim(recipe) is False
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_free(recipe: Recipe) -> None:
    folder = Path(recipe.run.output_dir)
    folder.mkdir(parents=True)
    (folder / "slurm.log").write_text("queued")
    assert claim(recipe) is False


def test_an_existing_run_is_refused_unless_it_is_to_be_resumed(recipe: Recipe) -> None:
    record(recipe, world_size=1, device="cpu")
    with pytest.raises(InputError, match=r"holds a run already; go on with it \(--resume auto\)"):
        claim(recipe)
    assert claim(change(recipe, resume="auto")) is True


def test_a_resumed_run_may_change_what_does_not_define_it(recipe: Recipe) -> None:
    record(recipe, world_size=1, device="cpu")
    free = {name: another(value, name) for name, value in recipe.flat().items() if name in FREE_ON_RESUME}
    free |= {"output_dir": recipe.run.output_dir, "resume": "auto"}
    assert claim(change(recipe, **free)) is True


@pytest.mark.parametrize("name", sorted(set(Recipe().flat()) - FREE_ON_RESUME))
def test_a_resumed_run_may_not_change_what_defines_it(recipe: Recipe, name: str) -> None:
    with pytest.raises(InputError) as caught:
        check_same_recipe(recipe, change(recipe, **{name: another(recipe.flat()[name], name)}), "there")
    [problem] = caught.value.problems
    assert problem.startswith(f"there: {name} is {recipe.flat()[name]!r} there and ")


def test_every_difference_is_listed_at_once_with_both_values(recipe: Recipe) -> None:
    record(recipe, world_size=1, device="cpu")
    with pytest.raises(InputError) as caught:
        claim(change(recipe, resume="auto", seed=7, dropout=0.1, betas=(0.8, 0.9), streams=None, num_workers=5))
    assert len(caught.value.problems) == 4
    for said in ("seed is 42 there and 7 now", "dropout is 0.3 there and 0.1 now", "betas", "streams"):
        assert sum(said in problem for problem in caught.value.problems) == 1
    assert all(str(Path(recipe.run.output_dir) / "recipe.yaml") in problem for problem in caught.value.problems)


def test_what_would_change_the_result_is_not_free() -> None:
    for name in ("seed", "batch_size", "learning_rate", "epochs", "max_steps", "augment", "dropout", "mixup_alpha"):
        assert name not in FREE_ON_RESUME
    for name in ("data_dir", "num_workers", "max_frames_per_microbatch", "log_every", "resume"):
        assert name in FREE_ON_RESUME


def test_a_file_in_the_place_of_the_folder_is_refused(recipe: Recipe) -> None:
    folder = Path(recipe.run.output_dir)
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    with pytest.raises(InputError, match="is a file; choose another --output_dir"):
        claim(recipe)


def test_a_folder_that_cannot_be_made_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        record(change(recipe, output_dir=str(tmp_path / "file" / "run")), world_size=1, device="cpu")


def test_the_resolved_recipe_is_kept_as_the_first_attempt_had_it(recipe: Recipe) -> None:
    record(recipe, world_size=1, device="cpu")
    record(change(recipe, resume="auto", num_workers=7), world_size=2, device="cpu")
    assert load_recipe(Path(recipe.run.output_dir) / "recipe.yaml") == recipe


def test_every_attempt_adds_its_environment(recipe: Recipe) -> None:
    record(recipe, world_size=2, device="cpu")
    record(recipe, world_size=3, device="cpu")
    attempts = json.loads((Path(recipe.run.output_dir) / "environment.json").read_text())
    assert [attempt["world_size"] for attempt in attempts] == [2, 3]


def test_the_environment_names_versions_commit_and_world_size() -> None:
    described = describe_environment(4, "cpu")
    assert described["world_size"] == 4
    assert described["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"signscale", "torch", "accelerate", "deepspeed", "numpy", "jiwer"} <= set(described["packages"])
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if answer.returncode == 0:
        assert described["git_commit"] == answer.stdout.strip()
    assert isinstance(described["git_changes"], bool)


def test_the_commit_is_that_of_the_code_wherever_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = describe_environment(1, "cpu")["git_commit"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    assert describe_environment(1, "cpu")["git_commit"] == here


def test_no_environment_variable_is_written_down(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-key-of-a-user")
    monkeypatch.setenv("SOME_VARIABLE", "s3cr3t-too")
    record(recipe, world_size=1, device="cpu")
    for path in Path(recipe.run.output_dir).iterdir():
        text = path.read_text()
        assert "s3cr3t" not in text
        assert "SOME_VARIABLE" not in text


def test_streams_and_betas_compare_by_value(recipe: Recipe) -> None:
    # A file gives lists where the defaults have tuples.
    same = change(recipe, betas=[0.9, 0.999], streams={"pose": [0, 3]})
    check_same_recipe(recipe, same, "there")
    assert replace(recipe) == recipe
