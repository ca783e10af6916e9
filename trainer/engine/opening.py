"""Which backend the launcher asks for, checked against the recipe before anything is started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from trainer.engine.configuration import Launch, read_launch
from trainer.engine.engine import Engine
from trainer.engine.precision import check_precision
from trainer.engine.processes import Processes
from trainer.engine.replicated import ReplicatedEngine
from trainer.recipe import Recipe

_BACKEND_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")


def open_engine(recipe: Recipe) -> Engine:
    """Join the ranks and open the backend that `accelerate launch` was configured for.

    Raises `InputError` if the launcher's configuration asks for what the engine does not offer, contradicts the recipe,
    or needs what this machine lacks.
    """
    launch = read_launch(os.environ, recipe)
    with _hidden_from_accelerate():
        processes = Processes(recipe.run)
    check_precision(recipe.run.mixed_precision, processes.device)
    return _open(launch, processes, recipe)


@contextlib.contextmanager
def _hidden_from_accelerate() -> Iterator[None]:
    """Keep accelerate from setting the backend up itself: it is asked for the processes alone."""
    hidden = {name: os.environ.pop(name) for name in _BACKEND_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        # A run that starts itself again must find them.
        os.environ |= hidden


def _open(launch: Launch, processes: Processes, recipe: Recipe) -> Engine:
    # Imported where it is used: DeepSpeed takes seconds.
    if launch.zero is not None:
        from trainer.engine.zero import ZeroEngine

        return ZeroEngine(processes, recipe.run, launch.zero)
    if launch.fsdp is not None:
        from trainer.engine.sharded import ShardedEngine

        return ShardedEngine(processes, recipe.run, offload=launch.fsdp.offload, reshard=launch.fsdp.reshard)
    return ReplicatedEngine(processes, recipe.run)
