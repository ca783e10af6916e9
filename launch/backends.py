"""Backends that are worth asking about, what each needs of memory, and the first that fits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.recipe import Recipe
from trainer.shipped import SHIPPED

# What needs torch is imported once the command line is known to be right.
if TYPE_CHECKING:
    from trainer.memory.activations import Counted
    from trainer.memory.static import Backend, ModelSize, StaticMemory
    from trainer.memory.worst import WorstCells

MARGIN = 0.1
"""Share of a device's memory that is left free."""
CONFIGURATIONS = SHIPPED / "ds_configs"
_ZERO = {
    "ZeRO-1": ("zero1", {"stage": 1}),
    "ZeRO-2": ("zero2", {"stage": 2}),
    "ZeRO-3": ("zero3", {"stage": 3}),
    "ZeRO-2, CPU offload": ("zero2_offload", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "ZeRO-3, CPU offload": (
        "zero3_offload",
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ),
}
"""The shipped configuration of each, and what stands in where there is none."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What passes take, with activation checkpointing off and on; None where that was not measured."""

    plain: Counted | None
    checkpointed: Counted | None
    reading: float
    """Bytes per slot of the cells that are read ahead."""

    def bytes(self, slots: int, padding: float, *, checkpointing: bool) -> float | None:
        """Return what a pass over so many slots takes."""
        from trainer.memory.model import Load

        counted = self.checkpointed if checkpointing else self.plain
        return None if counted is None else counted.passes.peak(Load(slots=slots, padded=round(slots * padding)))


def backends(world_size: int) -> dict[str, Backend]:
    """Return the backends that are worth asking about on so many ranks, by name, from the top of the ladder down."""
    from trainer.memory.static import Backend, zero_backend

    found = {"data parallel": Backend(kind="replicated")}
    for name, (file, fallback) in _ZERO.items():
        if world_size == 1 and "offload" not in name:
            # Nothing is shared on a single rank.
            continue
        path = CONFIGURATIONS / f"{file}.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"zero_optimization": fallback}
        found[name] = zero_backend(config)
    if world_size > 1:
        found["FSDP2"] = Backend(kind="fsdp2")
    found["FSDP2, CPU offload"] = Backend(kind="fsdp2", offload_optimizer=True)
    return found


def share_of(
    size: ModelSize, backend: Backend, recipe: Recipe, world_size: int, *, teacher: int, on_cuda: bool
) -> StaticMemory:
    """Return what one of `world_size` ranks holds of a model; `teacher`: bytes of the weights of its online teacher."""
    from trainer.memory.static import static_memory

    return static_memory(
        size,
        backend=backend,
        world_size=world_size,
        optimizer=recipe.optimization.optimizer,
        on_cuda=on_cuda,
        fused=recipe.optimization.fused_optimizer,
        teacher=teacher,
    )


def recommend(
    shares: dict[str, StaticMemory],
    passes: Passes,
    worst: WorstCells,
    slots: int,
    budget: int,
    capacity: int | None,
    recipe: Recipe,
) -> dict[str, Any]:
    """Come down the ladder to the first rung that fits; the order is that of a run that runs out of memory."""
    if capacity is None or passes.plain is None:
        return {"rung": None, "why": "give --device_gb and leave --measure on"}
    room = capacity * (1.0 - MARGIN)
    checkpointing = recipe.run.activation_checkpointing

    def largest(name: str, *, checkpointed: bool) -> int:
        """Return the recipe's budget or the largest that fits; 0 if not even the longest clip alone does."""
        static = shares[name]
        counted = passes.checkpointed if checkpointed else passes.plain
        assert counted is not None
        left = room - static.kept - static.in_passes
        if left <= 0 or static.kept + static.in_update > room:
            return 0
        taken = dataclasses.replace(counted.passes, per_slot=counted.passes.per_slot + passes.reading)
        fitting = min(
            taken.largest_budget(int(left), margin=0.0, padding=worst.padding),
            int((room - static.kept - static.in_update) / passes.reading),
        )
        if fitting >= slots:
            return budget
        return fitting if fitting >= worst.floor else 0

    rungs: list[tuple[str, str, bool, int]] = [
        ("data parallel", "data parallel", checkpointing, budget),
        ("smaller budget", "data parallel", checkpointing, worst.floor),
        ("activation checkpointing", "data parallel", True, worst.floor),
    ]
    rungs += [(name, name, True, worst.floor) for name in ("ZeRO-2", "ZeRO-3") if name in shares]
    offloaded = ("ZeRO-2, CPU offload", "ZeRO-3, CPU offload")
    rungs += [("CPU offload", name, True, worst.floor) for name in offloaded if name in shares]
    for rung, name, checkpointed, needed in rungs:
        found = largest(name, checkpointed=checkpointed)
        if found >= needed:
            return {
                "rung": rung,
                "backend": name,
                "activation_checkpointing": checkpointed,
                "max_frames_per_microbatch": found,
            }
    return {"rung": None, "why": "nothing fits: cut long clips (--max_frames), lower --width, or take a larger device"}
