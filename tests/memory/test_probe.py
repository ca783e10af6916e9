"""The probe finds what fits, survives what does not, and leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.memory.choice as choosing
from tests.conftest import ROOT, TINY, launch
from trainer.assembly import make_training_loader
from trainer.data.prepare import prepare_corpus
from trainer.engine import open_engine
from trainer.files import FencedFolder
from trainer.memory.choice import MEMORY, choose_budget
from trainer.models.build import build_model
from trainer.parsing import parse_recipe

WORKER = str(ROOT / "tests" / "memory" / "probe_worker.py")


def run_probe(tmp_path: Path, corpus: Path, world_size: int = 1, **settings: Any) -> list[dict[str, Any]]:
    out = tmp_path / "found"
    settings = {"corpus": str(corpus), "run": str(tmp_path / "run"), "flags": TINY, "goal": 4000, **settings}
    launch(world_size, WORKER, [str(out), json.dumps(settings)])
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world_size)]


def test_real_exhaustion_is_survived_and_the_budget_fits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # oneDNN keeps address space for each shape that it has met, 25 MB a cell here, up to a thousand operations.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    wide = ["--width", "0.5", "--rnn_size", "64", "--rnn_layers", "1", "--trackers", "[]"]
    (found,) = run_probe(tmp_path, corpus, flags=wide, address_mb=400, goal=40_000)
    assert any(not one["fits"] for one in found["passes"]), found
    # A pass of 4,096 frames fits; what ran out before must not stand in its way.
    assert 2000 < found["budget"] < 40_000
    assert found["fits"]
    assert found["fits_again"]
    assert found["again"] > 0.8 * found["budget"]
    assert found["gradient"] == 0.0


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_injected_exhaustion_bounds_the_budget(corpus: Path, tmp_path: Path, stage: str) -> None:
    (found,) = run_probe(tmp_path, corpus, inject={"rank": 0, "stage": stage, "above": 1500})
    assert found["floor"] < found["budget"] <= 1500
    assert found["budget"] > 1500 / 2
    assert found["gradient"] == 0.0


def test_where_everything_fits_the_budget_is_the_goal(corpus: Path, tmp_path: Path) -> None:
    (found,) = run_probe(tmp_path, corpus)
    assert found["budget"] == 4000
    assert all(one["fits"] for one in found["passes"])


def test_ranks_agree_on_what_the_least_of_them_can(corpus: Path, tmp_path: Path) -> None:
    (alone,) = run_probe(tmp_path, corpus)
    # By the model of the passes, room for some 1,500 frames on rank 1, and for all on rank 0.
    model = alone["model"]
    tight = int((model["fixed"] + 1500 * (model["per_slot"] + model["per_padded"])) / 0.9)
    first, second = run_probe(tmp_path, corpus, 2, limits=[tight * 10, tight])
    assert first["budget"] == second["budget"]
    assert first["passes"] == second["passes"]
    assert first["floor"] <= first["budget"] < 4000


@pytest.fixture
def choose(corpus: Path, tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Choose a budget for the synthetic corpus in this process."""

    def run(*flags: str, force: bool = True) -> tuple[int, list[str]]:
        said: list[str] = []
        recipe = parse_recipe(["--data_dir", str(corpus), "--output_dir", str(tmp_path), *TINY, *flags])
        engine = open_engine(recipe)
        prepared = prepare_corpus(
            recipe.corpus, recipe.model.total_stride, engine, lambda text: None, known=None, checked=""
        )
        loader = make_training_loader(recipe, prepared, engine)
        model = build_model(
            recipe.model, feature_dim=prepared.normalization.feature_dim, num_classes=len(prepared.vocabulary)
        )
        engine.prepare(model, recipe.optimization)
        folder = FencedFolder(tmp_path)
        budget = choose_budget(engine, loader, recipe=recipe, folder=folder, say=said.append, force=force)
        return budget, said

    return run


def test_a_budget_is_kept_for_the_same_model_and_device(
    choose: Callable[..., tuple[int, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, said = choose()
    assert "probed in" in said[0]
    assert json.loads((tmp_path / MEMORY).read_text())["budget"] == budget
    kept, said = choose()
    assert kept == budget
    assert "as probed before" in said[0]
    for change in (["--rnn_size", "16"], ["--mixed_precision", "bf16"], ["--activation_checkpointing", "true"]):
        _, said = choose(*change)
        assert "probed in" in said[0], change
    choose()
    monkeypatch.setattr(choosing, "granted", lambda device: 10**9)
    _, said = choose()
    assert "probed in" in said[0]


def test_a_damaged_file_is_made_again(choose: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    (tmp_path / MEMORY).write_text("{")
    budget, _ = choose()
    assert json.loads((tmp_path / MEMORY).read_text())["budget"] == budget


def test_what_the_recipe_names_stands(choose: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    assert choose("--max_frames_per_microbatch", "777") == (777, [])
    assert not (tmp_path / MEMORY).exists()


def test_a_cpu_without_a_limit_is_not_probed(
    choose: Callable[..., tuple[int, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "is_limited", lambda device: False)
    budget, said = choose("--batch_size", "3", force=False)
    assert "not probed" in said[0]
    assert not (tmp_path / MEMORY).exists()
    assert budget % 3 == 0
