"""The window: sums over the steps since the last line of metrics, kept in the run's state, and the means made of them.

A plain dictionary, so that a checkpoint holds it: a resumed run's first line covers the steps before it too.
"""

from __future__ import annotations

from typing import Any

from trainer.data.loader import StepShare
from trainer.step import StepOutcome


def add_step(
    window: dict[str, float],
    share: StepShare,
    outcome: StepOutcome,
    *,
    learning_rate: float,
    seconds: float,
) -> None:
    """Add a step to the sums; a skipped step counts in time alone."""
    sums = {
        "seconds": seconds,
        "rank_seconds": outcome.seconds,
        "wait_seconds": outcome.wait_seconds,
        "frames": float(share.frames),
        "slots": float(share.slots),
        "all_steps": 1.0,
        "imbalance": share.allotment.imbalance,
    }
    if outcome.applied:
        sums |= {"steps": 1.0, "loss": outcome.loss, "grad_norm": outcome.grad_norm}
        sums |= {f"train/{name}": value for name, value in outcome.terms.items()}
    for name, value in sums.items():
        window[name] = window.get(name, 0.0) + value
    window["lr"] = learning_rate


def means(window: dict[str, float]) -> dict[str, Any]:
    """Return the metrics of a window; none of an empty one."""
    if not window:
        return {}
    applied = window.get("steps", 0.0)
    metrics: dict[str, Any] = {
        "train/loss": window["loss"] / applied if applied else None,
        "train/grad_norm": window["grad_norm"] / applied if applied else None,
        "lr": window["lr"],
        "frames_per_second": window["frames"] / window["seconds"],
        "padding_fraction": 1.0 - window["frames"] / window["slots"],
        "rank_imbalance": window["imbalance"] / window["all_steps"],
        "data_wait_fraction": window["wait_seconds"] / window["rank_seconds"],
    }
    # The terms of the loss, where it has several.
    return metrics | {name: value / applied for name, value in window.items() if name.startswith("train/")}
