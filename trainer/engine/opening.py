"""Which backend the launcher asks for, checked against the recipe before anything is started."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from trainer.engine.configuration import Launch, read_launch
from trainer.engine.engine import Engine
from trainer.engine.precision import check_precision
from trainer.engine.processes import Processes
from trainer.engine.replicated import ReplicatedEngine
from trainer.errors import InputError
from trainer.recipe import Recipe

_HIDDEN = (
    *("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_"),
    "ACCELERATE_MIXED_PRECISION",
)
"""What the variables begin with that this engine reads in accelerate's place."""

_LEAST_ADDRESS_SPACE = 640 << 20
"""What threads, their stacks and arenas and the libraries' code take beside any tensor."""


def open_engine(recipe: Recipe) -> Engine:
    """Join the ranks and open the backend that `accelerate launch` was configured for.

    Raises `InputError`, on all ranks, if the launcher's configuration asks for what the engine does not offer,
    contradicts the recipe, or needs what the machine of one of them lacks.
    """
    with _hidden_from_accelerate():
        processes = Processes(recipe.run)
    # Machines may differ: what only one of them lacks must not leave its ranks silent and the others waiting.
    launch = processes.together(lambda: _read(recipe, processes))
    return _open(launch, processes, recipe)


def _read(recipe: Recipe, processes: Processes) -> Launch:
    """Read what the launcher asks for; say everything that stands in its way at once."""
    launch = Launch()
    problems: list[str] = []
    try:
        launch = read_launch(os.environ, recipe)
    except InputError as error:
        problems += error.problems
    try:
        check_precision(recipe.run.mixed_precision, processes.device)
    except InputError as error:
        problems += error.problems
    problems += _check_address_space()
    if problems:
        raise InputError(problems)
    return launch


def _check_address_space() -> Iterator[str]:
    """Name a limit so tight that libraries break in it which do not look whether they got what they asked for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if limit != resource.RLIM_INFINITY and limit - used < _LEAST_ADDRESS_SPACE:
        yield (
            f"ulimit -v (RLIMIT_AS): this process may use {limit >> 20} MB of address space and holds {used >> 20} MB "
            f"before any model is built, which leaves less than the {_LEAST_ADDRESS_SPACE >> 20} MB that threads and "
            "libraries need; raise the limit, or lift it (ulimit -v unlimited)"
        )


@contextlib.contextmanager
def _hidden_from_accelerate() -> Iterator[None]:
    """Keep accelerate from setting the backend up itself: it is asked for the processes alone."""
    names = [name for name in os.environ if name.startswith(_HIDDEN) and name != "ACCELERATE_USE_CPU"]
    hidden = {name: os.environ.pop(name) for name in names}
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
