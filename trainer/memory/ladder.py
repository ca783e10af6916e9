"""The ladder: what a run that does not fit gives up next, and its restart one rung lower."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch.distributed as dist

from trainer.engine.processes import RESTARTS, meeting_store, restarts
from trainer.shipped import SHIPPED

SMALLER_BUDGET, CHECKPOINTING = "smaller budget", "activation checkpointing"
"""The rungs on which a pass needs less, and nothing else."""

_TAKEN = "SIGNSCALE_RUNGS"
"""Environment variable with the rungs that this launch has come down already, as JSON."""
_KEY = "signscale/restart"
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A way to need less memory: flags and environment variables of the next attempt."""

    name: str
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    """What did not fit, for the log."""


def next_rung(
    *, backend: str, activation_checkpointing: bool, world_size: int, budget: int, floor: int, taken: Sequence[str]
) -> Rung | None:
    """Return the next rung below where a run stands; None on the last one.

    `budget` and `floor` are the micro-batch's frames now and at the least (one clip a cell). Each rung is taken once.
    """
    rungs: list[Rung] = []
    if budget > floor:
        rungs.append(Rung(name=SMALLER_BUDGET, flags=("--max_frames_per_microbatch", str(max(floor, budget // 2)))))
    if not activation_checkpointing:
        rungs.append(Rung(name=CHECKPOINTING, flags=("--activation_checkpointing", "true")))
    if backend.startswith("fsdp2"):
        if backend == "fsdp2":
            rungs.append(Rung(name="FSDP2 on the host", environment=(("FSDP_OFFLOAD_PARAMS", "true"),)))
    else:
        # On a single rank nothing is shared: of ZeRO, the host's memory alone helps.
        order = ["replicated", "zero1", "zero2", "zero3", "zero3_offload"]
        if world_size == 1:
            order = ["replicated", "zero1", "zero2_offload", "zero3_offload"]
        lower = order[order.index(backend) + 1 :] if backend in order else ["zero3_offload"]
        titles = {"zero2": "ZeRO-2", "zero3": "ZeRO-3", "zero2_offload": "CPU offload", "zero3_offload": "CPU offload"}
        rungs += [_zero(name, titles[name]) for name in lower if name in titles and name != backend]
    return next((rung for rung in rungs if rung.name not in taken), None)


def _zero(configuration: str, title: str) -> Rung:
    return Rung(
        name=title,
        environment=(
            ("ACCELERATE_USE_DEEPSPEED", "true"),
            ("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(SHIPPED / "ds_configs" / f"{configuration}.json")),
        ),
    )


class Descent(BaseException):
    """Ends this attempt on all ranks, which then start again one rung lower; no failure, not to be caught as one."""

    def __init__(self, rung: Rung) -> None:
        super().__init__(rung.name)
        self.rung = rung


def rungs_taken(environment: Mapping[str, str] = os.environ) -> list[Rung]:
    """Return the rungs that this launch has come down."""
    return [
        Rung(**{**stored, "flags": tuple(stored["flags"]), "environment": tuple(map(tuple, stored["environment"]))})
        for stored in json.loads(environment.get(_TAKEN, "[]"))
    ]


def start_again(rung: Rung) -> NoReturn:
    """Replace this process by the same command one rung lower, from the newest checkpoint; its memory goes with it."""
    environment = dict(os.environ)
    environment |= dict(rung.environment)
    environment[_TAKEN] = json.dumps([asdict(taken) for taken in (*rungs_taken(), rung)])
    environment[RESTARTS] = str(restarts() + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, *sys.orig_argv[1:], "--resume", "auto", *rung.flags]
    os.execve(sys.executable, command, environment)


class Watch:
    """Lets one rank start all of them again, though they wait for it inside a pass and hear nothing else.

    The rank leaves the rung in the store that the ranks met in; a thread of each of them looks there.
    """

    def __init__(self, world_size: int) -> None:
        self._store: dist.Store | None = None
        self._closed = threading.Event()
        self._restart: Callable[[Rung], Any] = start_again
        if world_size == 1:
            return
        # A connection of its own: the default one may be in use by the thread that waits.
        self._store = meeting_store("watch")
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def announce(self, rung: Rung) -> NoReturn:
        """Start all ranks again, this one included."""
        if self._store is not None:
            self._store.set(_KEY, json.dumps(asdict(rung)))
            # The others first: a rank that is gone breaks the connections of those that have not heard yet.
            time.sleep(4 * _POLL_SECONDS)
        start_again(rung)

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()

    def _look(self) -> None:
        assert self._store is not None
        while not self._closed.wait(_POLL_SECONDS):
            try:
                if not self._store.check([_KEY]):
                    continue
                stored = json.loads(self._store.get(_KEY))
            except (dist.DistError, RuntimeError):
                # The launcher is gone, and the store with it: nobody announces anything any more.
                return
            self._restart(
                Rung(
                    **{
                        **stored,
                        "flags": tuple(stored["flags"]),
                        "environment": tuple(map(tuple, stored["environment"])),
                    }
                )
            )
