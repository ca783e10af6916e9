"""How a clip's distributions are stored: all classes or the likeliest, in either precision; and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Dtype = Literal["float16", "float32"]

_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
_LEAST = -60000.0
"""Smallest log-probability stored: float16 ends at -65504, and beyond lies no number to train on."""
_MOST_INT16 = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What is stored of each output frame.

    Log-probabilities at temperature 1, from which any other follows, and of which float16 holds the likely ones most
    exactly. `top_k` > 0: of the k likeliest classes, with their numbers, and one value more for the mass of the rest.
    """

    dtype: Dtype
    top_k: int = 0

    @property
    def name(self) -> str:
        """Return how a table names it."""
        return f"{self.dtype} top-{self.top_k}" if self.top_k else self.dtype

    def bytes_per_frame(self, num_classes: int) -> int:
        """Return the bytes of a frame of `num_classes` classes."""
        size = _DTYPES[self.dtype].itemsize
        if not self.top_k:
            return size * num_classes
        return size * (self.top_k + 1) + _class_dtype(num_classes).itemsize * self.top_k

    def compress(self, log_probs: Tensor) -> dict[str, Tensor]:
        """Turn log-probabilities `[F, V]` into what is stored: `log_probs`, and `classes` where not all are kept."""
        dtype = _DTYPES[self.dtype]
        if not self.top_k:
            return {"log_probs": log_probs.clamp(min=_LEAST).to(dtype).contiguous()}
        kept, classes = log_probs.topk(self.top_k, dim=-1)
        rest = log_probs.scatter(-1, classes, -torch.inf).logsumexp(dim=-1, keepdim=True)
        return {
            "log_probs": torch.cat([kept, rest], dim=-1).clamp(min=_LEAST).to(dtype).contiguous(),
            "classes": classes.to(_class_dtype(log_probs.shape[-1])).contiguous(),
        }

    def restore(self, parts: dict[str, Tensor], num_classes: int) -> Tensor:
        """Return log-probabilities `[F, V]` in float32; what was not kept shares its mass equally."""
        stored = parts["log_probs"].float()
        if not self.top_k:
            return stored
        rest = stored[:, -1:] - math.log(num_classes - self.top_k)
        return rest.repeat(1, num_classes).scatter(-1, parts["classes"].long(), stored[:, :-1])

    def error(self, log_probs: Tensor, temperature: float) -> float:
        """Return the sum over frames of KL(exact || stored) in nats at a temperature, summed in float64."""
        exact = (log_probs.double() / temperature).log_softmax(dim=-1)
        restored = self.restore(self.compress(log_probs), log_probs.shape[-1])
        stored = (restored.double() / temperature).log_softmax(dim=-1)
        return float((exact.exp() * (exact - stored)).sum())


def _class_dtype(num_classes: int) -> torch.dtype:
    return torch.int16 if num_classes <= _MOST_INT16 else torch.int32
