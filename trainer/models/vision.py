"""torchvision's MobileNetV3, on machines with and without torchvision's compiled operators."""

from __future__ import annotations

import importlib
import sys
from pickle import UnpicklingError
from types import ModuleType
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from trainer.errors import InputError

_DECLARED: list[torch.library.Library] = []
"""Keeps the declarations below alive: a library takes its operators with it."""

_WEIGHTS = {
    "mobilenet_v3_small": "MobileNet_V3_Small_Weights",
    "mobilenet_v3_large": "MobileNet_V3_Large_Weights",
}


def import_models() -> ModuleType:
    """Import torchvision.models.

    The registry's wheel is built for CUDA. Beside a CPU build of torch its operators cannot be loaded, and the import
    fails over their declarations; with those made here, all that is written in Python works, which the models are.
    Raises `InputError` if torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise InputError(
            "model: MobileNetV3 comes from torchvision, which is not installed; pip install 'torchvision==0.28.0' "
            "(it goes with torch 2.13)"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    return importlib.import_module("torchvision.models")


def make_mobilenet(architecture: str, *, width: float, make_norm: Any) -> nn.Sequential:
    """Build the convolutional part of `mobilenet_v3_small` or `mobilenet_v3_large`, its classifier left out."""
    build = getattr(import_models(), architecture)
    features: nn.Sequential = build(width_mult=width, norm_layer=make_norm).features
    return features


def fetch_imagenet_weights(architecture: str) -> dict[str, Tensor]:
    """Download torchvision's ImageNet weights of an architecture, or take them from torch's cache.

    Raises `InputError` if they cannot be had.
    """
    weights = getattr(import_models(), _WEIGHTS[architecture]).DEFAULT
    try:
        found: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise InputError(
            f"pretrained: the ImageNet weights of {architecture} cannot be fetched ({error}); fetch {weights.url} on a "
            "machine that is online, and give the file by --init_from FILE instead of --pretrained"
        ) from error
    return found
