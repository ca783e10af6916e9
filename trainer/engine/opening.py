"""Which backend the launcher asks for, checked against the recipe before anything is started."""

from __future__ import annotations

import os

from trainer.engine.configuration import Launch, read_launch
from trainer.engine.engine import Engine
from trainer.engine.precision import check_precision
from trainer.engine.processes import Processes
from trainer.engine.replicated import ReplicatedEngine
from trainer.recipe import Recipe


def open_engine(recipe: Recipe) -> Engine:
    """Join the ranks and open the backend that `accelerate launch` was configured for.

    Raises `InputError` if the launcher's configuration asks for what the engine does not offer, contradicts the recipe,
    or needs what this machine lacks.
    """
    launch = read_launch(os.environ, recipe)
    launch.hide_from_accelerate()
    processes = Processes(recipe.run)
    check_precision(recipe.run.mixed_precision, processes.device)
    return _open(launch, processes, recipe)


def _open(launch: Launch, processes: Processes, recipe: Recipe) -> Engine:
    # Imported where it is used: DeepSpeed takes seconds.
    if launch.zero is not None:
        from trainer.engine.zero import ZeroEngine

        return ZeroEngine(processes, recipe.run, launch.zero)
    if launch.fsdp is not None:
        from trainer.engine.sharded import ShardedEngine

        return ShardedEngine(processes, recipe.run, offload=launch.fsdp.offload, reshard=launch.fsdp.reshard)
    return ReplicatedEngine(processes, recipe.run)
