"""Whether a run is free for a command that was typed: a launched job may be working on it."""

from __future__ import annotations

import shlex
from pathlib import Path

from trainer.errors import InputError
from trainer.job.directory import AttemptRecord, JobDirectory
from trainer.job.processes import is_alive, is_here


def check_not_launched(run: Path) -> None:
    """Raise `InputError` if an attempt of the run's job has begun and not ended, as far as its files tell.

    A local attempt whose leading process is gone from this machine has ended, whether it said so or not.
    """
    directory = JobDirectory.of(run)
    owner = directory.owner_attempt()
    if owner is None:
        return
    record = next((record for record in directory.history() if record.attempt == owner), None)
    word = directory.last_word()
    if (word is not None and word.attempt == owner) or (record is not None and _is_over(record)):
        return
    where = f" on {record.nodes or record.host}" if record is not None and (record.nodes or record.host) else ""
    name = shlex.quote(str(run))
    raise InputError(
        f"{run}: attempt {owner} of its job has begun{where} and not ended; look at it (signscale status {name}), or "
        f"end it (signscale cancel {name}), before a command works on this run beside it"
    )


def _is_over(record: AttemptRecord) -> bool:
    if record.ended is not None:
        return True
    return record.attempt.startswith("local-") and is_here(record) and not is_alive(record)
