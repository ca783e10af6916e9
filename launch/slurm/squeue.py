"""What SLURM's tools print of jobs, read into one form: squeue with named fields, scontrol show job, sacct."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.errors import InputError

SEPARATOR = "\x1f"
"""Between fields: a job's name or path may hold any printable character."""

_SQUEUE = ("%i", "%F", "%K", "%T", "%r", "%S", "%e", "%M", "%l", "%N", "%E", "%o")
SQUEUE_FORMAT = SEPARATOR.join(_SQUEUE)
"""For `squeue -o`: the command comes last, since a path may even hold a line break."""

_SACCT = ("JobID", "State", "Start", "End", "Elapsed", "Timelimit", "NodeList", "Submit")
SACCT_FORMAT = ",".join(_SACCT)

_UNKNOWN = frozenset({"", "N/A", "NONE", "None", "Unknown", "(null)", "None assigned", "Invalid", "INVALID"})
_ARRAY_ID = re.compile(r"(\d+)(?:_(?:(\d+)|\[([^\]]*)\]))?$")


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """One job, or one task of an array, as SLURM knows it."""

    job_id: str
    """As scancel takes it: 4711, or 4711_3."""
    base: str
    """As sbatch printed it: 4711 for a whole array."""
    task: int | None
    state: str
    """SLURM's long name: PENDING, RUNNING, TIMEOUT and so on."""
    reason: str = ""
    """SLURM's own word for why it waits, or how it ended."""
    start: float | None = None
    """Unix seconds; of a waiting job, when SLURM expects to start it."""
    end: float | None = None
    """Unix seconds; of a running job, its time limit."""
    elapsed: float | None = None
    """Seconds."""
    limit: float | None = None
    """Seconds."""
    nodes: str = ""
    """Compressed, as SLURM writes it: node[1-2]."""
    dependency: str = ""
    """What is left of its dependencies: afterok:17(unfulfilled)."""
    command: str | None = None
    """The batch script's path; None where the tool asked does not tell."""
    submitted: float | None = None
    """Unix seconds, where the tool asked tells."""


def parse_squeue(text: str) -> list[QueuedJob]:
    """Read the output of `squeue -h -r -o SQUEUE_FORMAT`. Raises `InputError` for a line of another form."""
    jobs = []
    for line in _joined(text):
        fields = line.split(SEPARATOR, len(_SQUEUE) - 1)
        if len(fields) != len(_SQUEUE):
            raise InputError(f"squeue: expected {len(_SQUEUE)} fields, found {line!r}; is squeue a wrapper here?")
        job_id, base, task, state, reason, start, end, elapsed, limit, nodes, dependency, command = fields
        jobs.append(
            QueuedJob(
                job_id=job_id,
                base=base,
                task=int(task) if task.isdecimal() else None,
                state=state,
                reason=_text(reason),
                start=parse_time(start),
                end=parse_time(end),
                elapsed=parse_duration(elapsed),
                limit=parse_duration(limit),
                nodes=_text(nodes),
                dependency=_text(dependency),
                command=_text(command) or None,
            )
        )
    return jobs


def parse_scontrol(text: str) -> list[QueuedJob]:
    """Read the output of `scontrol show job ID`, a paragraph per job."""
    jobs = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields = _paragraph(paragraph)
        if "JobState" not in fields:
            continue
        base = fields.get("ArrayJobId", fields["JobId"])
        for task in _tasks(fields.get("ArrayTaskId")):
            jobs.append(
                QueuedJob(
                    job_id=base if task is None else f"{base}_{task}",
                    base=base,
                    task=task,
                    state=fields["JobState"],
                    # Several words are joined by underscores here, and not by squeue.
                    reason=_text(fields.get("Reason", "")),
                    start=parse_time(fields.get("StartTime", "")),
                    end=parse_time(fields.get("EndTime", "")),
                    elapsed=parse_duration(fields.get("RunTime", "")),
                    limit=parse_duration(fields.get("TimeLimit", "")),
                    nodes=_text(fields.get("NodeList", "")),
                    dependency=_text(fields.get("Dependency", "")),
                    command=_text(fields.get("Command", "")) or None,
                    submitted=parse_time(fields.get("SubmitTime", "")),
                )
            )
    return jobs


def parse_sacct(text: str) -> list[QueuedJob]:
    """Read the output of `sacct -n -P -X --delimiter=SEPARATOR -o SACCT_FORMAT`."""
    jobs = []
    for line in text.splitlines():
        fields = line.split(SEPARATOR)
        match = _ARRAY_ID.match(fields[0])
        if len(fields) != len(_SACCT) or not match:
            raise InputError(f"sacct: expected {len(_SACCT)} fields, found {line!r}; is sacct a wrapper here?")
        _, state, start, end, elapsed, limit, nodes, submitted = fields
        # "CANCELLED by 1000": the number is the user's.
        word, _, by = state.partition(" ")
        for task in _tasks(match[2] or match[3]):
            jobs.append(
                QueuedJob(
                    job_id=match[1] if task is None else f"{match[1]}_{task}",
                    base=match[1],
                    task=task,
                    state=word,
                    reason=by,
                    start=parse_time(start),
                    end=parse_time(end),
                    elapsed=parse_duration(elapsed),
                    limit=parse_duration(limit),
                    nodes=_text(nodes),
                    submitted=parse_time(submitted),
                )
            )
    return jobs


def parse_duration(text: str) -> float | None:
    """Read [days-]hours:minutes:seconds or minutes:seconds; None for UNLIMITED and whatever is no time."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)(?:\.\d+)?", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def parse_time(text: str) -> float | None:
    """Read SLURM's local time, YYYY-MM-DDTHH:MM:SS; None for N/A, Unknown and the like."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _joined(text: str) -> Iterator[str]:
    """Yield whole records; a line without a separator belongs to the path that the record before ends in."""
    record: str | None = None
    for line in text.split("\n"):
        if SEPARATOR in line:
            if record is not None:
                yield record
            record = line
        elif record is not None and line:
            record += f"\n{line}"
    if record is not None:
        yield record


def _paragraph(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in text.splitlines():
        stripped = line.strip()
        # Names and paths run to the end of their line and may hold anything, "JobState=" included.
        head, found, name = stripped.partition("JobName=")
        if found and not fields:
            stripped = head
            fields["JobName"] = name
        if re.match(r"(Command|WorkDir|Comment|Std\w+)=", stripped):
            key, _, value = stripped.partition("=")
            fields.setdefault(key, value.rstrip())
            continue
        for word in re.findall(r"(\w[\w/:.]*)=(\S*)", stripped):
            fields.setdefault(*word)
    return fields


def _tasks(text: str | None) -> list[int | None]:
    """List the tasks that 3, 0-3 or 1,4-6%2 names; a job that is no array has none."""
    if not text:
        return [None]
    tasks: list[int | None] = []
    for part in text.partition("%")[0].split(","):
        first, _, rest = part.partition("-")
        last, _, stride = rest.partition(":")
        tasks += range(int(first), int(last or first) + 1, int(stride or 1))
    return tasks


def _text(text: str) -> str:
    return "" if text in _UNKNOWN else text
