"""What a transform makes of a single clip, for tests that look at one step of it."""

from __future__ import annotations

import numpy as np
import torch

from trainer.data.augment import Augmentation, draw_clip
from trainer.data.normalization import Normalization
from trainer.data.table import Storage
from trainer.data.transform import ClipContent, FeatureTransform

FLOAT32 = Storage(dtype=np.dtype(np.float32))
CPU = torch.device("cpu")


def unchanged(dim: int) -> Normalization:
    return Normalization(kind="none", mean=np.zeros(dim, np.float32), scale=np.ones(dim, np.float32))


def normalize(normalization: Normalization, features: np.ndarray) -> np.ndarray:
    transform = FeatureTransform(FLOAT32, normalization, noise=0.0, device=CPU)
    rows = torch.empty(features.shape)
    transform.apply(torch.from_numpy(features.copy()), rows, None)
    return rows.numpy()


def augment(clip: np.ndarray, key: int, *, rescaled: int, kept: int, strengths: Augmentation) -> np.ndarray:
    num_frames, dim = clip.shape
    transform = FeatureTransform(FLOAT32, unchanged(dim), noise=strengths.noise, device=CPU)
    draw = draw_clip(key, num_frames=num_frames, dim=dim, rescaled=rescaled, kept=kept, strengths=strengths)
    rows = torch.empty(kept, dim)
    transform.apply(torch.from_numpy(clip), rows, draw)
    return rows.numpy()


def resample(clip: np.ndarray, num_frames: int) -> np.ndarray:
    """Resample as a partner is, mixed in with all the weight."""
    transform = FeatureTransform(FLOAT32, unchanged(clip.shape[1]), noise=0.0, device=CPU)
    partner = ClipContent(stored=1, start=0, num_frames=len(clip))
    content = ClipContent(stored=0, start=0, num_frames=num_frames, share=0.0, partner=partner)
    stored = [torch.zeros(num_frames, clip.shape[1]), torch.from_numpy(clip)]
    rows = torch.empty(num_frames, clip.shape[1])
    transform.fill(rows, [content], lambda place, _: stored[place])
    return rows.numpy()
