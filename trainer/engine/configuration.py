"""What `accelerate launch` tells its processes by environment variables: the backend, and how it is configured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.recipe import Recipe


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
    fsdp: FsdpLaunch | None = None

    def hide_from_accelerate(self) -> None:
        """Keep accelerate from setting the backend up itself: it is asked for the processes alone."""
        for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(variable, None)


def is_on(environment: Mapping[str, str], variable: str) -> bool:
    """Tell whether a variable is set to true."""
    return environment.get(variable, "").lower() in ("1", "true", "yes")


def read_launch(environment: Mapping[str, str], recipe: Recipe) -> Launch:
    """Read what the launcher asks for; raises one `InputError` with everything that contradicts the recipe."""
    problems: list[str] = []
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("", "1"):
        problems.append(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: accumulation belongs to the recipe "
            "(--gradient_accumulation_steps); remove it from the launch configuration and the environment"
        )
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", recipe.run.mixed_precision):
        problems.append(
            f"mixed_precision: the launch configuration says {asked}, the recipe {recipe.run.mixed_precision}; say it "
            "in the recipe alone (--mixed_precision)"
        )
    launch = Launch()
    if is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        launch = Launch(zero=_read_zero(environment, problems))
    elif is_on(environment, "ACCELERATE_USE_FSDP"):
        launch = Launch(fsdp=_read_fsdp(environment, problems))
    if problems:
        raise InputError(problems)
    return launch


def _read_zero(environment: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    return dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _read_fsdp(environment: Mapping[str, str], problems: list[str]) -> FsdpLaunch:
    return FsdpLaunch(
        offload=is_on(environment, "FSDP_OFFLOAD_PARAMS"),
        reshard=environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
    )
