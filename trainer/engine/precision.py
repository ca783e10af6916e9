"""Precision: the forward pass in 16 bits where the recipe says so, the same under every backend.

Weights stay float32 and autocast chooses per operation, inside the model as each backend wraps it, so that the curve of
a recipe in bf16 or fp16 does not depend on the backend either. Logits leave in float32; softmax and CTC never see less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.layout import TimeLayout
from trainer.models.recognizer import Recognizer
from trainer.models.temporal_head import Outputs

Precision = Literal["no", "fp16", "bf16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PreciseModel(nn.Module):
    """A model that computes in the recipe's precision and returns float32 outputs; its state is the model's own."""

    def __init__(self, model: Recognizer, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._precision, self._device_type = precision, device.type

    def blocks(self) -> list[nn.Module]:
        """Return the model's blocks in the order of its forward pass, none inside another."""
        return self.model.blocks()

    def forward(self, features: Tensor, layout: TimeLayout) -> Outputs:
        """Return what the model makes of clips, float32."""
        if self._precision == "no":
            return self.model.outputs(features, layout)
        # Inside the module: DeepSpeed turns off an autocast that it finds around its own forward.
        with torch.autocast(self._device_type, _DTYPES[self._precision]):
            return self.model.outputs(features, layout).each(torch.Tensor.float)


@dataclass
class LossScale:
    """Dynamic loss scaling by the rule of torch.amp.GradScaler, on a decision that all ranks share.

    The loss is multiplied by `value`. A step whose gradient overflowed is skipped and halves it; `growth_interval`
    steps in a row without an overflow double it. GradScaler itself looks at the gradients of one rank, which under a
    sharded backend are not those of the others.
    """

    value: float = 2.0**16
    good_steps: int = 0
    """Steps in a row without an overflow since the scale last changed."""
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5

    is_dynamic = True
    """Whether there is a scale to adapt."""

    def update(self, *, overflowed: bool) -> None:
        """Note a step."""
        if overflowed:
            self.value *= self.backoff_factor
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= self.growth_factor
            self.good_steps = 0

    @property
    def collapsed(self) -> bool:
        """Tell whether no scale is left: below 1, what overflows is the model and not the scale."""
        return self.value < 1.0

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"value": self.value, "good_steps": float(self.good_steps)}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what a checkpoint kept."""
        self.value, self.good_steps = state["value"], int(state["good_steps"])


class NoLossScale(LossScale):
    """The scale of float32 and bf16, whose range needs none."""

    is_dynamic = False

    def __init__(self) -> None:
        super().__init__(value=1.0)

    def update(self, *, overflowed: bool) -> None:
        """Stay at 1."""

    @property
    def collapsed(self) -> bool:
        """Never."""
        return False

    def state(self) -> dict[str, float]:
        """Return nothing to keep."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Restore nothing."""


def make_loss_scale(precision: Precision) -> LossScale:
    """Return the loss scale that a precision needs."""
    return LossScale() if precision == "fp16" else NoLossScale()


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise `InputError` if the device cannot compute in a precision, which a pass of a few numbers shows."""
    if precision == "no":
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"mixed_precision: {name} has no bf16; use --mixed_precision fp16, or no")
    try:
        with torch.autocast(device.type, _DTYPES[precision]):
            sequence = torch.zeros(1, 2, 4, device=device, requires_grad=True)
            nn.functional.linear(nn.functional.conv1d(sequence, sequence), sequence[0, :, :1]).float().sum().backward()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"mixed_precision: {name} cannot compute in {precision} ({reason}); use --mixed_precision no"
        ) from error


@contextlib.contextmanager
def watch_overflow(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the names of modules whose output is not finite, in the order of the passes inside this context."""

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
                found.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
