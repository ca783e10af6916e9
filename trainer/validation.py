"""Evaluation of a split: every clip decoded exactly once on any number of ranks, counts summed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer.data.batch import MicroBatch
from trainer.data.loader import EvaluationLoader
from trainer.engine import Engine
from trainer.objectives.ctc import ctc_losses, float32_log_probs
from trainer.scoring.decoding import Emission, best_path
from trainer.scoring.protocols import Protocol, score
from trainer.scoring.wer import WerCounts


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of a split; `loss` is the mean over `loss_clips` clips of CTC loss per gloss, NaN if none has one."""

    counts: WerCounts
    loss: float
    loss_clips: int
    blank_rate: float
    emissions: dict[int, list[Emission]] = field(default_factory=dict)
    """Decoded classes of each clip by its index in the split; of this rank's clips alone."""

    def metrics(self, prefix: str) -> dict[str, Any]:
        """Name the figures for the log; the last four expose a collapsed model."""
        return {
            f"{prefix}/loss": self.loss,
            f"{prefix}/wer": self.counts.wer,
            f"{prefix}/blank_rate": self.blank_rate,
            f"{prefix}/empty_share": self.counts.empty_share,
            f"{prefix}/deletions_share": self.counts.deletions_share,
            f"{prefix}/mean_hypothesis_length": self.counts.mean_hypothesis_length,
        }


def evaluate(engine: Engine, loader: EvaluationLoader, *, budget: int, protocol: Protocol) -> Evaluation:
    """Evaluate a split with the engine's model; `budget` in frames bounds a micro-batch.

    Counts are int64 sums over clips, in one reduction that also proves the coverage: each clip once. Raises
    `AssertionError` if a clip was missed or counted twice.
    """
    model = engine.module
    model.eval()
    clips = loader.reader.clips
    seen = torch.zeros(len(clips), dtype=torch.int64)
    counts = WerCounts.zero()
    loss_sum = torch.zeros(1, dtype=torch.float64)
    frames = torch.zeros(3, dtype=torch.int64)
    emissions: dict[int, list[Emission]] = {}
    cells = loader.cells(rank=engine.rank, world_size=engine.world_size, budget=budget)
    with torch.no_grad():
        for cell in cells:
            if cell is None:
                continue
            decoded, losses, has_loss = _run_cell(engine, model, cell)
            loss_sum += losses.sum()
            frames[2] += int(has_loss.sum())
            for index, labels in zip(cell.clips, decoded, strict=True):
                seen[index] += 1
                frames[0] += len(labels)
                frames[1] += int((labels == 0).sum())
                emissions[index] = list(best_path(labels))
            references = [clips[index].glosses for index in cell.clips]
            hypotheses = [
                loader.vocabulary.decode(emission.label for emission in emissions[index]) for index in cell.clips
            ]
            counts = counts + score(references, hypotheses, protocol)
    model.train()
    vector = torch.cat([torch.tensor(counts.as_vector(), dtype=torch.int64), frames, seen])
    engine.all_reduce(vector)
    engine.all_reduce(loss_sum)
    width = len(counts.as_vector())
    counts = WerCounts.from_vector(vector[:width].tolist())
    num_frames, num_blank, loss_clips = vector[width : width + 3].tolist()
    if not bool((vector[width + 3 :] == 1).all()):
        raise AssertionError("an evaluation must count each clip exactly once")
    return Evaluation(
        counts=counts,
        loss=float(loss_sum) / loss_clips if loss_clips else float("nan"),
        loss_clips=loss_clips,
        blank_rate=num_blank / max(1, num_frames),
        emissions=emissions,
    )


def _run_cell(
    engine: Engine, model: torch.nn.Module, cell: MicroBatch
) -> tuple[list[np.ndarray], torch.Tensor, torch.Tensor]:
    """Return the best class of each frame clip by clip, the loss per gloss of each clip, and which clips have one."""
    moved = cell.to(engine.device)
    with engine.autocast():
        logits = model(moved.features, moved.layout)
    log_probs = float32_log_probs(logits)
    has_loss = cell.labels.weights > 0
    losses = ctc_losses(log_probs, cell.layout.output_lengths, moved.labels).cpu().double()
    # Where there is no loss the value is that of a stand-in label: it must not reach the sum, not even as 0 * inf.
    losses = torch.where(has_loss, losses / cell.labels.lengths, torch.zeros_like(losses))
    best = logits.argmax(dim=-1).cpu().numpy()
    ends = np.cumsum(cell.layout.output_lengths)
    return np.split(best, ends[:-1]), losses, has_loss
