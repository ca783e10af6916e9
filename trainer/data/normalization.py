"""Feature normalisation: computed once from the training split, stored with the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trainer.data.features import Moments
from trainer.errors import InputError

Kind = Literal["corpus", "clip", "none", "frames"]


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """How raw features become the model's input; `mean` and `scale` are float32 `[D]`, used by kind `corpus`.

    Kind `frames` is that of video: frames stay uint8, D is their three channels, and the model normalises them.

    The input is `(features - mean) * scale`; `trainer.data.transform` computes it.
    """

    kind: Kind
    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    @property
    def feature_dim(self) -> int:
        """Return D."""
        return len(self.mean)

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        save_file({"mean": self.mean, "scale": self.scale}, path, metadata={"kind": self.kind})

    @classmethod
    def load(cls, path: Path) -> Normalization:
        """Read what `save` wrote; raises `InputError` if it is missing or damaged."""
        try:
            with safe_open(path, framework="numpy") as file:
                return cls(kind=file.metadata()["kind"], mean=file.get_tensor("mean"), scale=file.get_tensor("scale"))
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a stored normalisation ({error}); restore the file from a backup") from error


def from_moments(kind: Kind, moments: Sequence[Moments], feature_dim: int) -> Normalization:
    """Build the normalisation from the moments of the training clips, merged in the order given."""
    if kind != "corpus":
        return Normalization(kind=kind, mean=np.zeros(feature_dim, np.float32), scale=np.ones(feature_dim, np.float32))
    total = moments[0]
    for part in moments[1:]:
        total = total.merge(part)
    spread = np.sqrt(total.m2 / total.count)
    return Normalization(kind=kind, mean=total.mean.astype(np.float32), scale=_inverse(total.mean, spread))


def of_frames() -> Normalization:
    """Return the normalisation of video, which is the model's own."""
    return Normalization(kind="frames", mean=np.zeros(3, np.float32), scale=np.ones(3, np.float32))


def clip_statistics(features: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return mean and inverse spread `[D]` of one clip `[T, D]`, for kind `clip`."""
    mean = features.mean(axis=0, dtype=np.float64)
    return mean.astype(np.float32), _inverse(mean, features.std(axis=0, dtype=np.float64))


def _inverse(mean: npt.NDArray[np.float64], spread: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    # A dimension that varies by rounding alone is constant: dividing by its spread would turn it into noise.
    constant = spread <= 1e-6 * np.maximum(1.0, np.abs(mean))
    return np.where(constant, 1.0, 1.0 / np.where(constant, 1.0, spread)).astype(np.float32)
