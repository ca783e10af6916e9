"""What `accelerate launch` tells its processes by environment variables: the backend, and how it is configured.

Anything that this engine would not do as it was asked is an error: a setting that does nothing is a trap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.engine.zero_configuration import read_zero_configuration
from trainer.errors import InputError
from trainer.recipe import Recipe

_FSDP_YAML = "accelerate_configs/fsdp2.yaml"


@dataclass(frozen=True, kw_only=True)
class FsdpLaunch:
    """How FSDP2 is configured."""

    offload: bool = False
    """Whether shards lie on the host between their uses."""
    reshard: bool = True
    """Whether a block's weights are parted again after its forward pass."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The backend that the launcher asks for: ZeRO by a DeepSpeed configuration, FSDP2, or neither."""

    zero: dict[str, Any] | None = None
    """DeepSpeed's configuration, read and complete."""
    fsdp: FsdpLaunch | None = None


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A variable of the launcher that must be left as it is."""

    variable: str
    key: str
    """What a launch configuration calls it."""
    accepted: tuple[str, ...]
    """Values that ask for nothing, in lower case; unset is always one of them."""
    mend: str


_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off", "none")

_ALWAYS = (
    _Setting(
        variable="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        key="gradient_accumulation_steps",
        accepted=("1",),
        mend="accumulation is the recipe's (--gradient_accumulation_steps); remove it",
    ),
    _Setting(
        variable="ACCELERATE_DYNAMO_BACKEND",
        key="dynamo_backend",
        accepted=_OFF,
        mend='the engine does not compile the model; set "NO"',
    ),
    *(
        _Setting(
            variable=f"ACCELERATE_USE_{name}",
            key=f"use_{name.lower()}",
            accepted=_OFF,
            mend="this engine does not drive it; launch with one of accelerate_configs/",
        )
        for name in ("MEGATRON_LM", "PARALLELISM_CONFIG", "TP", "SAGEMAKER", "XLA")
    ),
)

_DEEPSPEED = (
    *(
        _Setting(
            variable=f"ACCELERATE_DEEPSPEED_{name}",
            key=name.lower(),
            accepted=() if name == "ZERO_STAGE" else _OFF,
            mend="the file of deepspeed_config_file says it; remove it",
        )
        for name in ("ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE")
    ),
    _Setting(
        variable="ACCELERATE_DEEPSPEED_ZERO3_INIT",
        key="zero3_init_flag",
        accepted=_OFF,
        mend="weights are made whole and then parted; set false",
    ),
    _Setting(
        variable="ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
        key="zero3_save_16bit_model",
        accepted=_OFF,
        mend="checkpoints are the trainer's, in float32; set false",
    ),
    _Setting(
        variable="ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
        key="deepspeed_moe_layer_cls_names",
        accepted=_OFF,
        mend="there are no such layers; remove it",
    ),
)

_FSDP = (
    _Setting(
        variable="FSDP_SHARDING_STRATEGY",
        key="fsdp_sharding_strategy",
        accepted=("full_shard", "1"),
        mend="FSDP2 has fsdp_reshard_after_forward instead: true for FULL_SHARD, false for SHARD_GRAD_OP; remove it",
    ),
    _Setting(
        variable="FSDP_AUTO_WRAP_POLICY",
        key="fsdp_auto_wrap_policy",
        accepted=("", "transformer_based_wrap"),
        mend="what is wrapped are the model's own blocks; remove it",
    ),
    _Setting(
        variable="FSDP_TRANSFORMER_CLS_TO_WRAP",
        key="fsdp_transformer_layer_cls_to_wrap",
        accepted=_OFF,
        mend="what is wrapped are the model's own blocks; remove it",
    ),
    _Setting(
        variable="FSDP_MIN_NUM_PARAMS",
        key="fsdp_min_num_params",
        accepted=("", "0", "100000000"),
        mend="what is wrapped are the model's own blocks; remove it",
    ),
    _Setting(
        variable="FSDP_IGNORED_MODULES",
        key="fsdp_ignored_modules",
        accepted=_OFF,
        mend="all weights are parted; remove it",
    ),
    _Setting(
        variable="FSDP_BACKWARD_PREFETCH",
        key="fsdp_backward_prefetch",
        accepted=("", "none", "no_prefetch"),
        mend="FSDP2 fetches ahead by itself; remove it",
    ),
    _Setting(
        variable="FSDP_FORWARD_PREFETCH",
        key="fsdp_forward_prefetch",
        accepted=_OFF,
        mend="FSDP2 fetches ahead by itself; set false",
    ),
    _Setting(
        variable="FSDP_USE_ORIG_PARAMS",
        key="fsdp_use_orig_params",
        accepted=("", *_ON),
        mend="FSDP2 knows nothing else than weights under their own names; remove it",
    ),
    _Setting(
        variable="FSDP_STATE_DICT_TYPE",
        key="fsdp_state_dict_type",
        accepted=("",),
        mend="checkpoints are the trainer's, the same under every backend; remove it",
    ),
    _Setting(
        variable="FSDP_CPU_RAM_EFFICIENT_LOADING",
        key="fsdp_cpu_ram_efficient_loading",
        accepted=_OFF,
        mend="it is for models of transformers, and accelerate's default; set false",
    ),
    _Setting(
        variable="FSDP_ACTIVATION_CHECKPOINTING",
        key="fsdp_activation_checkpointing",
        accepted=_OFF,
        mend="it is the recipe's, under every backend (--activation_checkpointing true); set false",
    ),
    _Setting(
        variable="FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
        key="fsdp_activation_checkpointing_offload",
        accepted=_OFF,
        mend="activations are computed again, not moved (--activation_checkpointing true); set false",
    ),
)


def is_on(environment: Mapping[str, str], variable: str) -> bool:
    """Tell whether a variable is set to true."""
    return environment.get(variable, "").lower() in _ON


def read_launch(environment: Mapping[str, str], recipe: Recipe) -> Launch:
    """Read what the launcher asks for.

    Raises one `InputError` with everything that contradicts the recipe, that this engine would not do, or that this
    machine lacks for it.
    """
    problems = list(_refused(environment, _ALWAYS))
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("", "no", recipe.run.mixed_precision):
        problems.append(
            f"mixed_precision: the launch configuration says {asked}, the recipe {recipe.run.mixed_precision}; say it "
            "in the recipe alone (--mixed_precision)"
        )
    launch = Launch()
    deepspeed, fsdp = (is_on(environment, f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP"))
    if deepspeed and fsdp:
        problems.append("the launcher asks for DeepSpeed and for FSDP; launch with one of accelerate_configs/ alone")
    elif deepspeed:
        launch = Launch(zero=_read_zero(environment, recipe.optimization.gradient_clip, problems))
    elif fsdp:
        launch = Launch(fsdp=_read_fsdp(environment, problems))
    if problems:
        raise InputError(problems)
    return launch


def _refused(environment: Mapping[str, str], settings: tuple[_Setting, ...]) -> Iterator[str]:
    for setting in settings:
        value = environment.get(setting.variable)
        if value is not None and value.lower() not in setting.accepted:
            yield f"{setting.key} ({setting.variable}={value}): {setting.mend}"


def _read_zero(environment: Mapping[str, str], gradient_clip: float, problems: list[str]) -> dict[str, Any] | None:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path in ("", "none"):
        problems.append(_without_file(environment))
        return None
    problems += _refused(environment, _DEEPSPEED)
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "")
    if clipping not in ("", "none", "0", "0.0", str(gradient_clip), f"{gradient_clip:g}"):
        problems.append(
            f"gradient_clipping (ACCELERATE_GRADIENT_CLIPPING={clipping}): the recipe says {gradient_clip:g}; remove "
            "it and say it in the recipe alone (--gradient_clip)"
        )
    try:
        return read_zero_configuration(path, gradient_clip)
    except InputError as error:
        problems += error.problems
        return None


def _without_file(environment: Mapping[str, str]) -> str:
    """Name the shipped file that says what the launcher's own settings do."""
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    device = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    name = f"zero{stage if stage in ('1', '2', '3') else 2}"
    if name != "zero1" and device in ("cpu", "nvme"):
        name += "_nvme" if (name, device) == ("zero3", "nvme") else "_offload"
    return (
        "deepspeed_config_file (ACCELERATE_DEEPSPEED_CONFIG_FILE) is missing: expected a DeepSpeed configuration, "
        f"found zero_stage {stage}, offload_optimizer_device {device} alone; launch with "
        f"accelerate_configs/deepspeed_{name}.yaml, or set deepspeed_config_file: ds_configs/{name}.json in its place"
    )


def _read_fsdp(environment: Mapping[str, str], problems: list[str]) -> FsdpLaunch:
    version = environment.get("FSDP_VERSION", "")
    if version != "2":
        problems.append(
            f"fsdp_version (FSDP_VERSION={version}): expected 2, FSDP's first version is not driven; launch with "
            f"{_FSDP_YAML}, or set fsdp_version: 2"
        )
    problems += _refused(environment, _FSDP)
    return FsdpLaunch(
        offload=_read_flag(environment, "FSDP_OFFLOAD_PARAMS", False, problems),
        reshard=_read_flag(environment, "FSDP_RESHARD_AFTER_FORWARD", True, problems),
    )


def _read_flag(environment: Mapping[str, str], variable: str, default: bool, problems: list[str]) -> bool:
    value = environment.get(variable, "").lower()
    if value in ("true", "false", ""):
        return default if not value else value == "true"
    problems.append(f"{variable.lower()} ({variable}={environment[variable]}): expected true or false")
    return default
