"""Probe a teacher's memory in a process of its own: OUT, and settings as JSON.

{"corpus", "run", "flags": […], "goal", "limits": [bytes per rank] or null, "address_mb": address space left, or null,
"inject": {"rank", "stage", "above": slots} or null}. Writes what was found, and whether a pass of that size fits after.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.assembly import make_training_loader
from trainer.data.prepare import prepare_corpus
from trainer.engine import open_engine
from trainer.memory.cells import random_cell, run_pass
from trainer.memory.exhaustion import is_exhaustion
from trainer.memory.probe import probe
from trainer.memory.worst import find_worst
from trainer.models.build import build_model
from trainer.parsing import parse_recipe


def main(out: str, settings: str) -> None:
    """Probe, and try what was found."""
    asked = json.loads(settings)
    recipe = parse_recipe(["--data_dir", asked["corpus"], "--output_dir", asked["run"], *asked["flags"]])
    engine = open_engine(recipe)
    corpus = prepare_corpus(recipe.corpus, recipe.model.total_stride, engine, lambda text: None, known=None, checked="")
    loader = make_training_loader(recipe, corpus, engine)
    dim, classes = corpus.normalization.feature_dim, len(corpus.vocabulary)
    engine.prepare(build_model(recipe.model, feature_dim=dim, num_classes=classes), recipe.optimization)
    if asked.get("address_mb"):
        _limit_address_space(asked["address_mb"])
    inject = asked.get("inject")
    if inject and inject["rank"] == engine.rank:
        _inject(engine, inject)
    worst = find_worst(loader.plan, size=16, world_size=engine.world_size, budget=asked["goal"])
    # Cells of any size are wanted here.
    worst.__dict__["fullest"] = worst.fullest.repeat(50)
    limits = asked.get("limits")
    found = probe(
        engine,
        loader,
        worst,
        goal=asked["goal"],
        limit=lambda device: limits[engine.rank] if limits else None,
    )
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    result: dict[str, Any] = {
        "budget": found.budget,
        "fits": found.fits,
        "floor": worst.floor,
        "passes": [vars(one) for one in found.passes],
        "model": vars(found.model),
        "gradient": max((float(g.abs().max()) for g in gradients), default=0.0),
    }
    cell = random_cell(
        worst.largest(found.budget),
        total_stride=recipe.model.total_stride,
        feature_dim=dim,
        num_classes=classes,
        device=engine.device,
    )
    result["again"] = cell.layout.length
    try:
        run_pass(engine, cell, recipe.objective)
        result["fits_again"] = True
    except Exception as error:
        if not is_exhaustion(error):
            raise
        result["fits_again"] = False
    Path(f"{out}.{engine.rank}").write_text(json.dumps(result))
    engine.close()


def _limit_address_space(left: int) -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    size = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (size + left * 1_000_000, resource.RLIM_INFINITY))


def _inject(engine: Any, inject: dict[str, Any]) -> None:
    """Let memory run out in passes over more than so many slots."""
    original = getattr(engine, inject["stage"])
    slots = 0

    def forward(features: torch.Tensor, layout: Any) -> torch.Tensor:
        nonlocal slots
        slots = layout.length
        if inject["stage"] == "forward" and slots > inject["above"]:
            raise torch.OutOfMemoryError("injected")
        return plain(features, layout)

    def backward(loss: torch.Tensor, denominator: float, *, is_last: bool) -> None:
        if slots > inject["above"]:
            # Half-way: some weights have a gradient by now.
            original(loss, denominator, is_last=is_last)
            raise torch.OutOfMemoryError("injected")
        original(loss, denominator, is_last=is_last)

    plain = engine.forward
    engine.forward = forward
    if inject["stage"] == "backward":
        engine.backward = backward


if __name__ == "__main__":
    main(*sys.argv[1:])
