"""Where an attempt's words are: one log of everything, and the launcher's files of each rank."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.errors import InputError
from trainer.job.directory import JobDirectory, read_lines

_NODE, _NUMBERED = re.compile(r"node-(\d+)"), re.compile(r"attempt_(\d+)")
STREAMS = ("stdout", "stderr")


def find_attempt(directory: JobDirectory, wanted: str | None) -> str | None:
    """Return the name of the newest attempt, or of the one asked for; None where none has begun.

    Raises `InputError` naming the attempts there are.
    """
    names = [record.attempt for record in directory.history()]
    if wanted is None:
        return names[-1] if names else None
    if wanted not in names:
        there = ", ".join(names) or "none has begun yet"
        raise InputError(f"--attempt {wanted}: no such attempt in {directory.attempts}; expected one of: {there}")
    return wanted


def find_sources(directory: JobDirectory, attempt: str, rank: int | None, ranks_per_node: int | None) -> list[Path]:
    """List the files to print: the log of everything, or what one rank wrote; they may not be there yet.

    Raises `InputError` where the attempt has ranks, but not this one.
    """
    if rank is None:
        return [directory.logs / f"{attempt}.log"]
    folder = directory.logs / attempt
    ranks = list_ranks(folder, ranks_per_node)
    if rank in ranks:
        return [ranks[rank] / f"{stream}.log" for stream in STREAMS]
    if not ranks:
        return []
    numbers = ", ".join(map(str, sorted(ranks)))
    raise InputError(f"--rank {rank}: attempt {attempt} has no such rank in {folder}; expected one of: {numbers}")


def find_outputs(directory: JobDirectory) -> list[Path]:
    """List what SLURM kept of the newest submission: all there is of a job that failed before its first attempt."""
    submissions = read_lines(directory.submissions)
    if not submissions:
        return []
    job_id = submissions[-1]["job_id"]
    return sorted((*directory.logs.glob(f"slurm-{job_id}.out"), *directory.logs.glob(f"slurm-{job_id}_*.out")))


def list_ranks(folder: Path, ranks_per_node: int | None) -> dict[int, Path]:
    """Map each rank of an attempt to the folder with its stdout.log and stderr.log.

    The launcher of node N writes node-N/<its id>/attempt_0/<local rank>/. Where the ranks of a node are not known,
    they are counted.
    """
    ranks: dict[int, Path] = {}
    first = 0
    for number, node in _numbered(folder, _NODE):
        locals_ = _local_ranks(node)
        base = first if ranks_per_node is None else number * ranks_per_node
        ranks |= {base + local: path for local, path in locals_.items()}
        first += len(locals_)
    return ranks


def _local_ranks(node: Path) -> dict[int, Path]:
    tries = [
        (path.stat().st_mtime, number, path)
        for launcher in _folders(node)
        for number, path in _numbered(launcher, _NUMBERED)
    ]
    if not tries:
        return {}
    newest = max(tries)[2]
    return {int(path.name): path for path in _folders(newest) if path.name.isdecimal()}


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    matches = ((pattern.fullmatch(path.name), path) for path in _folders(folder))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
