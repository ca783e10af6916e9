"""Launch configurations: those shipped are driven as they stand, and what would be ignored is an error instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from trainer.engine.configuration import read_launch
from trainer.engine.zero_configuration import read_zero_configuration
from trainer.errors import InputError
from trainer.recipe import OptimizationRecipe, Recipe, RunRecipe

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def write(folder: Path, **changes: Any) -> str:
    """A configuration of ZeRO-2 with changes; None removes a key."""
    content = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | changes
    path = folder / "ds.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(path)


def test_the_flavours_that_the_readme_names_are_shipped() -> None:
    names = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]
    assert [path.stem for path in SHIPPED] == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_deepspeeds_own_and_have_nothing_left_to_guess(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    text = path.read_text()
    assert '"auto"' not in text
    content = json.loads(text)
    parsed = DeepSpeedConfig(content)
    assert parsed.zero_optimization_stage == content["zero_optimization"]["stage"] == int(path.stem[4])
    # Left out, DeepSpeed would clip at 1.
    assert content["gradient_clipping"] == 0.0
    assert parsed.gradient_accumulation_steps == 1
    if path.stem != "zero3_nvme":
        assert read_zero_configuration(str(path), 1.0)["zero_optimization"] == content["zero_optimization"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping.*gradient_clipping"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com.*overlap_comm"),
        ({"fp16": {"enabled": True}}, "fp16.*--mixed_precision"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"gradient_clipping": 0.3}, "gradient_clipping.*0.3"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "auto"),
        ({"zero_optimization": {"stage": 0}}, "stage"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer.*needs no compiler"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.nvme_path is missing: expected a folder on a local NVMe disk",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            "stage 2 does not offload to nvme",
        ),
    ],
)
def test_what_the_engine_would_not_do_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_zero_configuration(path, 1.0)
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, fp16={"enabled": True}, scheduler={"type": "WarmupLR"}, gradient_accumulation_steps=2)
    with pytest.raises(InputError) as caught:
        read_zero_configuration(path, 1.0)
    assert len(caught.value.problems) == 3


def test_a_file_that_is_not_there_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json is not there.*zero2\.json"):
        read_zero_configuration("nowhere.json", 1.0)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json: expected a DeepSpeed configuration in JSON"):
        read_zero_configuration(str(tmp_path / "broken.json"), 1.0)


def test_a_relative_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_zero_configuration("ds_configs/zero3.json", 1.0)["zero_optimization"]["stage"] == 3


def test_the_launcher_says_which_backend() -> None:
    recipe = Recipe(optimization=OptimizationRecipe(gradient_clip=0.5))
    assert read_launch({}, recipe).zero is None
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero1.json"}
    found = read_launch(zero, recipe)
    assert found.zero is not None
    assert found.zero["zero_optimization"]["stage"] == 1
    fsdp = read_launch({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, recipe)
    assert fsdp.fsdp is not None
    assert fsdp.fsdp.offload


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp2.yaml|fsdp_version"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "activation_checkpointing",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "does not drive"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision"),
    ],
)
def test_a_launch_that_contradicts_the_recipe_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_launch(environment, Recipe(run=RunRecipe(mixed_precision="no")))
