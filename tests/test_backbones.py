"""Which norm a run has, where its backbone's weights come from, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from trainer.backbones import settle_norm
from trainer.errors import InputError
from trainer.models.build import ARCHITECTURES, build_model
from trainer.models.norms import FrameGroupNorm, FrozenBatchNorm
from trainer.models.vision import fetch_imagenet_weights, import_models
from trainer.parsing import dump_recipe, load_recipe, parse_recipe
from trainer.recipe import ARCHITECTURE_HEADS, VIDEO_MODELS, ModelRecipe, Recipe, RunRecipe
from trainer.run_directory import check_same_recipe


def make_recipe(*, init_from: str = "", **model: object) -> Recipe:
    return Recipe(model=ModelRecipe(**model), run=RunRecipe(init_from=init_from))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", sorted(VIDEO_MODELS))
def test_every_video_model_is_built_from_its_name_with_a_norm_of_its_own(architecture: str) -> None:
    for options, kind in (
        ({}, FrameGroupNorm),
        ({"norm": "frozen"}, FrozenBatchNorm),
        ({"norm": "group"}, FrameGroupNorm),
    ):
        model = build_model(
            ModelRecipe(model=architecture, width=0.1, **options),  # type: ignore[arg-type]
            feature_dim=0,
            num_classes=5,
        )
        norms = {type(module) for module in model.modules()} & {FrozenBatchNorm, FrameGroupNorm}
        assert norms == {kind}
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
        assert model.frame_dtype == torch.uint8
        assert model.head.classifier.out_features == 5
    assert ARCHITECTURES.keys() == ARCHITECTURE_HEADS.keys()


def test_the_norm_is_frozen_with_loaded_weights_and_else_of_the_group() -> None:
    def settle(recipe: Recipe, start: Recipe | None = None) -> str | None:
        return settle_norm(recipe, start).model.norm

    assert settle(make_recipe(model="i3d")) == "group"
    assert settle(make_recipe(model="i3d", init_from="rgb.pt")) == "frozen"
    assert settle(make_recipe(model="mobilenet_v3_small", pretrained=True)) == "frozen"
    # What is said is done.
    assert settle(make_recipe(model="i3d", norm="group", init_from="rgb.pt")) == "group"
    # A run that goes on, or starts from another run, has that run's norm.
    for norm in ("frozen", "group"):
        start = make_recipe(model="i3d", norm=norm)
        assert settle(make_recipe(model="i3d"), start) == norm
        assert settle(make_recipe(model="i3d", init_from="runs/teacher"), start) == norm
    assert settle(make_recipe(model="teacher")) is None


def test_a_stored_recipe_names_the_norm(tmp_path: Path) -> None:
    settled = settle_norm(make_recipe(model="i3d", init_from="rgb.pt"), None)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(settled), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == settled
    # Loaded without the weights it began with, it still builds the same model.
    alone = dataclasses.replace(settled.model, width=0.1)
    assert any(isinstance(m, FrozenBatchNorm) for m in build_model(alone, feature_dim=0, num_classes=3).modules())


def test_a_run_goes_on_with_its_norm_unless_another_is_asked_for() -> None:
    stored = make_recipe(model="i3d", norm="frozen", init_from="rgb.pt")
    check_same_recipe(stored, make_recipe(model="i3d"), "there")
    check_same_recipe(stored, make_recipe(model="i3d", norm="frozen"), "there")
    with pytest.raises(InputError, match="there: norm is 'frozen' there and 'group' now"):
        check_same_recipe(stored, make_recipe(model="i3d", norm="group"), "there")


def test_frozen_statistics_come_from_somewhere_once_it_is_known_where_a_run_goes_on_from() -> None:
    recipe = make_recipe(model="i3d", norm="frozen")
    assert settle_norm(recipe, recipe).model.norm == "frozen"
    with pytest.raises(InputError, match="has no checkpoint to go on from; add --pretrained true or --init_from FILE"):
        settle_norm(recipe, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--norm", "group"], "norm: is for models of video, teacher takes features"),
        (["--model", "student", "--pretrained", "true"], "pretrained: is for models of video, student takes features"),
        (["--model", "i3d", "--pretrained", "true"], "pretrained: is for mobilenet_v3_"),
        (["--model", "i3d", "--norm", "frozen"], "norm: frozen statistics come with loaded weights"),
        (["--model", "i3d", "--streams", "{pose: [0, 9]}"], "streams: are slices of features, i3d takes video"),
        (["--model", "mobilenet_v3_small", "--pretrained", "true", "--init_from", "x"], "pretrained and init_from"),
        (["--model", "mobilenet_v3_small", "--pretrained", "true", "--width", "0.5"], "of width 1.0, not 0.5"),
    ],
)
def test_impossible_combinations_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_recipe(["--data_dir", "x", *flags])
    assert len(refused.value.problems) == 1
    assert message in refused.value.problems[0]


def test_sync_is_not_offered() -> None:
    with pytest.raises(InputError, match="norm"):
        parse_recipe(["--data_dir", "x", "--model", "i3d", "--norm", "sync"])


def test_without_a_network_the_weights_are_an_error_that_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # Nothing listens there.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="--init_from FILE instead of --pretrained") as refused:
        fetch_imagenet_weights("mobilenet_v3_small")
    assert "mobilenet_v3_small-" in refused.value.problems[0]


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "mobilenet_v3_large"])
def test_weights_that_torchvision_has_fetched_before_need_no_network(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    models = import_models()
    published = getattr(models, architecture)().state_dict()
    url = models.get_model_weights(architecture).DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(published, cached)
    found = fetch_imagenet_weights(architecture)
    assert found.keys() == published.keys()
    assert all(torch.equal(value, published[name]) for name, value in found.items())
    cached.write_bytes(b"cut off")
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch_imagenet_weights(architecture)
