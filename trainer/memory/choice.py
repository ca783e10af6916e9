"""The budget of a micro-batch: what the recipe names, what an earlier probe found, or what a probe finds now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.loader import TrainingLoader
from trainer.distillation import Distillation, Undistilled
from trainer.engine import Engine
from trainer.files import FencedFolder
from trainer.layout import slot_frames
from trainer.memory.accounting import device_name, fragmentation, granted, is_limited
from trainer.memory.exhaustion import free_memory
from trainer.memory.probe import ProbeResult, probe
from trainer.memory.worst import find_worst
from trainer.recipe import Recipe

MEMORY = "memory.json"
_VERSION = 1
_STATES = {"adamw": 2, "adam": 2, "sgd": 1}

Say = Callable[[str], None]


def choose_budget(
    engine: Engine,
    loader: TrainingLoader,
    *,
    recipe: Recipe,
    folder: FencedFolder,
    say: Say,
    force: bool = False,
    distillation: Distillation | Undistilled | None = None,
) -> int:
    """Return `max_frames_per_microbatch` for this hardware; all ranks must call it, and get the same.

    What the recipe names stands. Else the cells are probed and the result kept in the run directory; a CPU without a
    limit of its own is not probed unless `force` asks for it.
    """
    if recipe.batch.max_frames_per_microbatch:
        return int(recipe.batch.max_frames_per_microbatch)
    plan = loader.plan
    longest = int(slot_frames(np.array([plan.num_frames.max()]), plan.total_stride)[0])
    usual = recipe.batch.batch_size * longest
    if not force and not any(engine.gather_objects(is_limited(engine.device))):
        say(
            f"memory: nothing limits this process but the machine's memory, not probed; {usual} frames a micro-batch "
            "(batch_size x the longest clip)"
        )
        return usual
    size = recipe.global_batch_size(engine.world_size)
    worst = find_worst(plan, size=size, world_size=engine.world_size, budget=usual)
    # On a GPU a larger cell is a faster one; on a CPU it is not.
    goal = max(usual, worst.most) if engine.device.type == "cuda" else max(usual, worst.floor)
    key = _key(engine, loader, recipe, goal, worst.floor)
    path = folder.path / MEMORY
    stored = engine.on_main(lambda: _read(path, key))
    if stored is not None:
        say(f"memory: {stored} frames a micro-batch, as probed before ({path.name})")
        return stored
    states = _STATES[recipe.optimization.optimizer]
    found = probe(engine, loader, worst, goal=goal, states=states, distillation=distillation)
    engine.on_main(lambda: folder.write_json(MEMORY, _to_json(found, key, engine)))
    say(_describe(found))
    idle = fragmentation(engine.device)
    if idle is not None and idle.hint:
        say(f"memory: {idle.hint}")
    free_memory()
    return found.budget


def _key(engine: Engine, loader: TrainingLoader, recipe: Recipe, goal: int, floor: int) -> str:
    """Hash what the result depends on, of all ranks."""
    facts = {
        "version": _VERSION,
        "model": asdict(recipe.model),
        "objective": asdict(recipe.objective),
        "distillation": asdict(recipe.distillation),
        "optimizer": recipe.optimization.optimizer,
        "precision": recipe.run.mixed_precision,
        "activation_checkpointing": recipe.run.activation_checkpointing,
        "compile": recipe.run.compile,
        "num_workers": recipe.corpus.num_workers,
        "feature_dim": loader.split.feature_dim,
        "classes": len(loader.vocabulary),
        "backend": engine.name,
        "world_size": engine.world_size,
        "goal": goal,
        "longest": floor,
        "devices": engine.gather_objects((device_name(engine.device), granted(engine.device))),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> int | None:
    """Return the budget of an earlier probe of the same; None if there is none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return int(stored["budget"]) if stored["key"] == key else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        # Of no use, and made again in a moment.
        return None


def _to_json(found: ProbeResult, key: str, engine: Engine) -> dict[str, Any]:
    return {
        "key": key,
        "budget": found.budget,
        "fits": found.fits,
        "capacity": found.capacity,
        "backend": engine.name,
        "world_size": engine.world_size,
        "device": device_name(engine.device),
        "model": found.model.to_json(),
        "passes": [asdict(one) for one in found.passes],
    }


def _describe(found: ProbeResult) -> str:
    room = "" if found.capacity is None else f" of {found.capacity / 1e9:.1f} GB"
    model = found.model
    text = (
        f"memory: {found.budget} frames a micro-batch, probed in {len(found.passes)} passes "
        f"({model.fixed / 1e9:.2f} GB and {model.per_slot / 1e6:.3f} MB a frame{room})"
    )
    return text if found.fits else f"{text}; warning: the longest clip alone ran out of memory"
