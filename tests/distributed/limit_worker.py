"""Train as `trainer.train` does, with an address space that may grow by ROOM_MB once training begins."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import trainer.train
from trainer.exits import exit_on_input_error
from trainer.loop import TrainingRun


def main() -> int:
    """Set the limit when the run begins, then train."""
    start = TrainingRun._train

    def limited(self: Any) -> str:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * os.sysconf("SC_PAGE_SIZE")
        limit = now + int(os.environ["ROOM_MB"]) * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return start(self)

    TrainingRun._train = limited  # type: ignore[method-assign]
    return trainer.train.main()


if __name__ == "__main__":
    exit_on_input_error(main)
