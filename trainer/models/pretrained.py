"""Weights of a published backbone into a video model, whose head starts fresh."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import InputError, name_some
from trainer.models.norms import FrozenBatchNorm
from trainer.models.recognizer import Recognizer

_BACKBONE = "backbone."
_CLASSIFIERS = ("logits.", "classifier.")
"""What the published checkpoints call their classifiers: I3D, MobileNetV3."""

_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, .safetensors or what `torch.save` wrote; nothing in the file is executed.

    A state dict under the key `state_dict`, or with names that begin with `module.`, is taken too. Raises `InputError`
    if the file holds anything else.
    """
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:200]
        if isinstance(error, UnpicklingError):
            # torch's own text advises to load the file with its code.
            reason = "it was not written by torch.save, or holds more than tensors, and code is never loaded"
        raise InputError(
            f"{path}: expected a state dict (.safetensors, or .pt as torch.save writes it), cannot read it "
            f"({reason or type(error).__name__}); fetch the file again, or save model.state_dict()"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(torch.is_tensor(value) for value in found.values()):
        raise InputError(f"{path}: expected a state dict (names and tensors), found another object; save one of those")
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def load_backbone(model: Recognizer, weights: dict[str, Tensor], *, architecture: str, where: str) -> str:
    """Load a published checkpoint's weights into the backbone of `architecture`; return a line on what was left out.

    Only the classifier may be left out and, where the model normalises without them, the statistics of BatchNorm.
    Raises `InputError` if the model has no backbone, or the checkpoint is of another architecture.
    """
    own = {
        name.removeprefix(_BACKBONE): value for name, value in model.state_dict().items() if name.startswith(_BACKBONE)
    }
    if not own:
        raise InputError(
            f"{where}: is a file of weights, and {architecture} has no published backbone to load them into; give a "
            "checkpoint of this trainer, or choose a video model"
        )
    frozen = any(isinstance(module, FrozenBatchNorm) for module in model.modules())
    classifier = [name for name in weights if name.startswith(_CLASSIFIERS)]
    statistics = [] if frozen else [name for name in weights if name.endswith(_STATISTICS)]
    taken = {name: value for name, value in weights.items() if name not in {*classifier, *statistics}}
    # Counts of batches are absent from files that an older torch has written, and mean nothing to frozen statistics.
    missing = [name for name in own if name not in taken and not name.endswith(".num_batches_tracked")]
    unknown = [name for name in taken if name not in own]
    misfits = [
        f"{name} {list(taken[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in taken and taken[name].shape != own[name].shape
    ]
    faults = [
        f"{what} {name_some(names, 3)}"
        for what, names in (("lacks", missing), ("has in excess", unknown), ("holds", misfits))
        if names
    ]
    if faults:
        raise InputError(
            f"{where}: is a checkpoint of another architecture than {architecture}: {'; '.join(faults)}; choose the "
            "model it belongs to, at width 1.0"
        )
    with torch.no_grad():
        for name, value in taken.items():
            own[name].copy_(value)
    left = [f"{len(classifier)} tensors of its classifier"] if classifier else []
    left += [f"{len(statistics)} statistics of BatchNorm, which the model's norm has no use for"] if statistics else []
    return f"{where}: {len(taken)} tensors loaded into the backbone; left out: {', '.join(left) or 'nothing'}"
