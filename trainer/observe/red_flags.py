"""Red flags: what usually lies behind the figures that bring people to a halt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def find_red_flags(metrics: Mapping[str, Any], *, epoch: int, warmup_epochs: float) -> list[str]:
    """Explain a validation that looks wrong; empty if it does not.

    CTC models rest near 100 % WER, all blank, for their first epochs: nothing is said before that is over.
    """
    flags = []
    if epoch < warmup_epochs + 20:
        return []
    if metrics["val/empty_share"] > 0.9:
        flags.append(
            f"red flag: {metrics['val/empty_share']:.0%} of the dev hypotheses are empty after {epoch} epochs (blank "
            "collapse); usual causes: features not normalised, or twice (--normalization), a learning rate too high "
            "or too low; --config configs/overfit.yaml tells in minutes whether model and corpus fit"
        )
    elif metrics["val/wer"] > 95 and metrics.get("train/wer", 100.0) > 95:
        flags.append(
            f"red flag: WER {metrics['val/wer']:.1f} % in dev and training after {epoch} epochs; usual causes: "
            "features and annotations that do not belong together, or too few steps; try --config configs/overfit.yaml"
        )
    elif metrics["val/wer"] > 80 and metrics.get("train/wer", 100.0) < 20:
        flags.append(
            f"red flag: WER {metrics['val/wer']:.1f} % in dev but {metrics['train/wer']:.1f} % in training; the model "
            "learns by heart, or dev features were made differently from training features"
        )
    return flags
