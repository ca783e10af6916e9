"""The loop one would write by hand on one GPU, for the GPU benchmark to compare with: random batches, padded.

A `Dataset` of npz files, uncompressed, a shuffling `DataLoader` with worker processes and pinned memory, the same
module on what is padded to the longest clip of each batch, autocast and `GradScaler`, accumulation, clipping. Nothing
is logged. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from usual_training import NpzClips, PaddedTeacher, pad, padded_loss

from trainer.data.normalization import from_moments
from trainer.data.opening import OpenCorpus
from trainer.engine import seed_everything
from trainer.layout import lay_out
from trainer.memory.exhaustion import memory_figures
from trainer.optimization import make_optimizer
from trainer.parsing import parse_recipe
from trainer.recipe import CorpusRecipe

_SHARED_MEMORY = 10**9
"""Bytes that batches on their way from worker processes may take; many containers have less."""
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class PaddedOnDevice(PaddedTeacher):
    """The padded teacher where its features are."""

    def forward(self, features: Tensor) -> Tensor:
        """Map padded features `[B, T, D]` to logits `[B, T', V]`, float32."""
        clips, longest = features.shape[:2]
        keys = self.rng.integers(2**63, size=clips, dtype=np.uint64)
        layout = lay_out(np.full(clips, longest), self.teacher.total_stride, keys).to(features.device)
        logits: Tensor = self.teacher(features.flatten(0, 1), layout)
        return logits.view(clips, -1, logits.shape[-1]).float()


def main(argv: Sequence[str]) -> int:
    """Train and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--npz", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    options, flags = parser.parse_known_args(argv)
    recipe = parse_recipe(flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, rounds = recipe.run.mixed_precision, recipe.batch.gradient_accumulation_steps
    moments = OpenCorpus(CorpusRecipe(data_dir=recipe.corpus.data_dir), lambda _: None).moments
    assert moments is not None, "a packed corpus has the moments of its training clips"
    shared = shutil.disk_usage("/dev/shm").free
    workers = options.workers if shared >= _SHARED_MEMORY else 0
    clips = NpzClips(options.npz, from_moments("corpus", [moments], len(moments.mean)))
    batches = endless(
        DataLoader(
            clips,
            recipe.batch.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=pad,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
    )
    seed_everything(recipe.run.seed)
    model = PaddedOnDevice(recipe, clips).to(device).train()
    optimizer = make_optimizer(model, recipe.optimization)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    began = waited = 0.0
    frames = 0
    for step in range(recipe.run.max_steps):
        if step == options.warmup:
            began, waited, frames = now(device), 0.0, 0
        for _ in range(rounds):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            frames += int(batch["num_frames"].sum())
            # Lengths stay on the host, where CTC asks for them.
            for name in ("features", "classes"):
                batch[name] = batch[name].to(device, non_blocking=True)
            with torch.autocast(device.type, _DTYPES.get(precision), enabled=precision != "no"):
                logits = model(batch["features"])
            scaler.scale(padded_loss(logits, batch) / rounds).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimization.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    seconds = now(device) - began
    done = (recipe.run.max_steps - options.warmup) * rounds * recipe.batch.batch_size
    figures = {
        "clips_per_second": done / seconds,
        "frames_per_second": frames / seconds,
        "data_wait_fraction": waited / seconds,
        "workers": workers,
        "peak_bytes": int(memory_figures(device)["memory/peak_mb"] * 1e6),
    }
    print(json.dumps(figures))
    return 0


def endless(loader: DataLoader[object]) -> Iterator[dict[str, Tensor]]:
    """Yield batches, epoch after epoch."""
    while True:
        yield from loader


def now(device: torch.device) -> float:
    """Return the clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
