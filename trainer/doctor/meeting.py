"""How the doctor's ranks tell each other what they found: through the store in which they met, without collectives.

A check that breaks on one rank leaves the others waiting inside a collective. Here that rank can still say so.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import write_json

if TYPE_CHECKING:
    import torch.distributed as dist

_OTHERS_SECONDS = 60.0
"""How much longer than rank 0 the others wait."""


class Meeting:
    """A place where every rank leaves something under a name, and finds what all left."""

    def __init__(self, store: dist.Store | None, rank: int, world_size: int, *, seconds: float) -> None:
        """Meet in `store` (None: a rank alone); rank 0 waits for the others so many seconds."""
        self._store, self._rank, self._world_size, self._seconds = store, rank, world_size, seconds

    def exchange(self, name: str, item: Any) -> list[Any]:
        """Return what all ranks left under `name`, as JSON keeps it; None in place of a rank that did not come."""
        if self._store is None:
            return [json.loads(json.dumps(item))]
        self._store.set(f"{name}/{self._rank}", json.dumps(item))
        if self._rank:
            self._store.wait([f"{name}/all"], timedelta(seconds=self._seconds + _OTHERS_SECONDS))
            return list(json.loads(self._store.get(f"{name}/all")))
        deadline = time.monotonic() + self._seconds
        found = [self._take(f"{name}/{rank}", deadline) for rank in range(self._world_size)]
        # One answer for all: a rank in time for one of them and late for another would part their ways.
        self._store.set(f"{name}/all", json.dumps(found))
        return found

    def _take(self, key: str, deadline: float) -> Any:
        import torch.distributed as dist

        assert self._store is not None
        try:
            self._store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except dist.DistStoreError:
            return None
        return json.loads(self._store.get(key))


class Phases:
    """What this rank is at, in a file: what remains to be read of a rank that hangs or dies."""

    def __init__(self, report: Path, rank: int) -> None:
        self._path = report / f"rank-{rank}.json"
        self._number = 0

    def enter(self, phase: str) -> None:
        """Say what comes now."""
        self._number += 1
        write_json(self._path, {"number": self._number, "phase": phase, "since": time.time()})
