"""Optimizer and learning-rate schedule of a recipe."""

from __future__ import annotations

import inspect
import math

import torch
from torch import nn

from trainer.recipe import OptimizationRecipe


def make_optimizer(model: nn.Module, recipe: OptimizationRecipe) -> torch.optim.Optimizer:
    """Build the optimizer; weight decay falls on weight matrices, not on biases and normalisation."""
    _leave_the_compiler_out()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate, betas = recipe.learning_rate, recipe.betas
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=betas[0], fused=recipe.fused_optimizer or None)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, betas=betas, fused=recipe.fused_optimizer or None)


def plain_step(optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step as it is written, without hooks.

    torch wraps it in a break for graphs that are being traced, and the break imports torch's compiler.
    """
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def _leave_the_compiler_out() -> None:
    """Keep the optimizer from importing torch's compiler, a good part of a rank's start (benchmarks/start.py).

    torch marks these methods as not to be traced, and the mark imports `torch._dynamo` at their first call
    (`torch/_compile.py`; it looks for what it has found before under this attribute). Only blocks of the model are
    ever compiled here, so the plain methods will do. Where torch keeps the mark otherwise, it imports as before.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain


def learning_rate(epochs_done: float, *, total_epochs: float, peak: float, recipe: OptimizationRecipe) -> float:
    """Return the learning rate of the step that brings the run to `epochs_done` (> 0, fractional).

    A pure function of progress: nothing to save, nothing to step, the same on any world size. Warm-up rises linearly
    and starts above zero, because the first step already counts as progress.
    """
    warmup = min(float(recipe.warmup_epochs), total_epochs)
    if recipe.scheduler == "onecycle" and not warmup:
        # A cycle without a rise would be plain cosine; 30 % is the usual rise (Smith & Topin 2018).
        warmup = 0.3 * total_epochs
    floor = min(float(recipe.min_lr), peak)
    if epochs_done < warmup:
        return peak * epochs_done / warmup
    if recipe.scheduler == "constant" or total_epochs <= warmup:
        return peak
    progress = min(1.0, (epochs_done - warmup) / (total_epochs - warmup))
    if recipe.scheduler == "cosine_with_restarts" and progress < 1.0:
        # The peak falls to half at each restart: late restarts should not undo what was learnt.
        cycle, progress = divmod(progress * recipe.restarts, 1.0)
        peak = max(floor, peak * 0.5**cycle)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
