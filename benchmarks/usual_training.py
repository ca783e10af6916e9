"""Training on features the usual way, for `train_features.py` to compare with: npz files, padded random batches.

What one writes with Accelerate or Lightning: a dataset that reads and normalises a compressed npz file per clip, a
`DataLoader` that pads, the module on what is padded, PyTorch's CTC on true lengths.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from trainer.data.normalization import Normalization
from trainer.engine import seed_everything
from trainer.layout import lay_out
from trainer.models.build import build_model
from trainer.optimization import make_optimizer
from trainer.recipe import Recipe

_DECLARATIONS: list[torch.library.Library] = []
"""Declared operators are forgotten when these are."""


class Clock(NamedTuple):
    """Seconds on the clock, and of the processor in all threads and worker processes of this rank."""

    wall: float
    cpu: float


def now() -> Clock:
    """Look at both clocks."""
    workers = [psutil.Process(worker.pid).cpu_times() for worker in multiprocessing.active_children()]
    return Clock(time.perf_counter(), time.process_time() + sum(times.user + times.system for times in workers))


class Clip(NamedTuple):
    """A clip as the usual dataset gives it: features `[T, D]`, classes `[S]`."""

    features: Tensor
    classes: Tensor


class NpzClips(Dataset[Clip]):
    """The training split of a corpus with a file per clip, normalised when it is read."""

    def __init__(self, corpus: Path, normalization: Normalization) -> None:
        rows = (corpus / "annotations" / "train.corpus.csv").read_text(encoding="utf-8").splitlines()[1:]
        self.clips = [(corpus / row.split("|")[1], row.split("|")[3].split()) for row in rows]
        glosses = sorted({gloss for _, sentence in self.clips for gloss in sentence})
        self.class_of = {gloss: number for number, gloss in enumerate(glosses, start=1)}
        self.normalization = normalization

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        path, sentence = self.clips[index]
        with np.load(path) as archive:
            features = archive["features"]
        features = (features - self.normalization.mean) * self.normalization.scale
        return Clip(torch.from_numpy(features), torch.tensor([self.class_of[gloss] for gloss in sentence]))


def pad(clips: Sequence[Clip]) -> dict[str, Tensor]:
    """Collate clips as usual: padded to the longest, with their lengths."""
    return {
        "features": pad_sequence([clip.features for clip in clips], batch_first=True),
        "num_frames": torch.tensor([len(clip.features) for clip in clips]),
        "classes": pad_sequence([clip.classes for clip in clips], batch_first=True),
        "num_glosses": torch.tensor([len(clip.classes) for clip in clips]),
    }


def make_loader(clips: NpzClips, clips_per_rank: int, workers: int) -> DataLoader[Clip]:
    """Build the loader of random batches."""
    return DataLoader(
        clips,
        clips_per_rank,
        shuffle=True,
        drop_last=True,
        collate_fn=pad,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class PaddedTeacher(nn.Module):
    """The same module on clips that are all as long as the longest: it computes on what is padded."""

    def __init__(self, recipe: Recipe, clips: NpzClips) -> None:
        super().__init__()
        self.teacher = build_model(
            recipe.model, feature_dim=clips.normalization.feature_dim, num_classes=len(clips.class_of) + 1
        )
        self.rng = np.random.default_rng(recipe.run.seed)

    def forward(self, features: Tensor) -> Tensor:
        """Map padded features `[B, T, D]` to logits `[B, T', V]`."""
        clips, longest = features.shape[:2]
        keys = self.rng.integers(2**63, size=clips, dtype=np.uint64)
        layout = lay_out(np.full(clips, longest), self.teacher.total_stride, keys)
        logits: Tensor = self.teacher(features.flatten(0, 1), layout)
        return logits.view(clips, -1, logits.shape[-1])


def padded_loss(logits: Tensor, batch: dict[str, Tensor], total_stride: int = 4) -> Tensor:
    """Return the CTC loss per gloss, mean over clips: what the recipe's `clip_target` is; logits `[B, T', V]`."""
    lengths = -(-batch["num_frames"] // total_stride)
    log_probs = logits.log_softmax(dim=-1).transpose(0, 1)
    return F.ctc_loss(log_probs, batch["classes"], lengths, batch["num_glosses"], zero_infinity=True)


def train_with_accelerate(recipe: Recipe, clips: NpzClips, *, steps: int, workers: int) -> list[Clock]:
    """Train with a plain Accelerate loop, `batch_size` clips a rank; return when each step ended."""
    accelerator = Accelerator()
    seed_everything(recipe.run.seed)
    model = PaddedTeacher(recipe, clips)
    optimizer = make_optimizer(model, recipe.optimization)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, make_loader(clips, recipe.batch.batch_size, workers)
    )
    ends: list[Clock] = []
    while len(ends) < steps:
        for batch in loader:
            loss = padded_loss(model(batch["features"]), batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), recipe.optimization.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            ends.append(now())
            if len(ends) == steps:
                break
    accelerator.end_training()
    return ends


def train_with_lightning(recipe: Recipe, clips: NpzClips, *, steps: int, workers: int) -> list[Clock]:
    """Train with Lightning's Trainer, `batch_size` clips a rank; return when each step ended."""
    _let_torchvision_import()
    import lightning

    ends: list[Clock] = []

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return padded_loss(self.model(batch["features"]), batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.model, recipe.optimization)

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(now())

    seed_everything(recipe.run.seed)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=recipe.optimization.gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(PaddedTeacher(recipe, clips)), make_loader(clips, recipe.batch.batch_size, workers))
    return ends


def _let_torchvision_import() -> None:
    """Import torchvision, where it is installed, even if its compiled half cannot be loaded.

    Lightning imports it for metrics that nobody here computes. A CUDA build does not load beside a torch for the CPU,
    and then the import fails, for two operators that were never declared.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARATIONS.append(library)
        importlib.import_module("torchvision")
