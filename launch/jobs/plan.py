"""The plan of a job: what `signscale launch` resolved, as RUN/job/plan.json keeps it for all who come after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.errors import InputError
from trainer.files import write_json
from trainer.job.directory import Cancellation, JobDirectory

Way = Literal["debug", "local", "slurm"]
WAYS: tuple[Way, ...] = ("debug", "local", "slurm")
MULTI_NODE = "accelerate_configs/multi_node.yaml"
_VERSION = 1


def unique_name(run: Path) -> str:
    """Return the name of a batch job that was given none: no other run's, so that it may be a singleton by its name."""
    return f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:6]}"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Which code a job runs."""

    commit: str | None = None
    """Of git; None where there is no repository."""
    changed: bool = False
    """Whether files differed from that commit; the difference is in snapshot/diff.patch."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of an array: a run of its own that differs from the plan's in a few settings."""

    run: Path
    overrides: dict[str, Any]
    """Flags of the command by name, added after the plan's arguments."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One job, with nothing left to be resolved."""

    way: Way
    name: str
    run: Path
    """Folder that RUN/job lies in."""
    command: tuple[str, ...]
    """As typed after `--`, paths made absolute."""
    module: str
    """What every rank runs (`python -m`)."""
    arguments: tuple[str, ...]
    """What every rank is given."""
    interpreter: str
    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 1
    accelerate_config: str | None = MULTI_NODE
    """Configuration of `accelerate launch`; relative to the code. None: no launcher at all."""
    launcher: Literal["accelerate", "plain"] = "accelerate"
    """plain: processes with RANK and WORLD_SIZE and nothing else, for commands without torch."""
    use_cpu: bool = False
    """Ranks compute on CPUs, whatever devices there are."""
    snapshot: Path | None = None
    """Copy of the code that the job runs; None: the code where it lies."""
    code: Code = Code()
    max_attempts_without_progress: int = 3
    """Attempts in a row without a new step saved, after which the job is given up."""
    meeting_seconds: float = 120.0
    """How long the nodes of an attempt wait for one another."""
    created: float
    """Unix seconds."""
    slurm: dict[str, Any] | None = None
    """Every option of the batch job, by name."""
    tasks: tuple[Task, ...] | None = None
    """Of a job array, by their number."""
    sweep: tuple[str, ...] = ()
    """Of a sweep, KEY=VALUE,VALUE each, as typed."""
    array: str = ""
    """Of a sweep, --array as typed; `slurm` has what it came to."""
    recipe: dict[str, Any] | None = None
    """Of `train`: the resolved recipe, flat, which RUN/job/recipe.yaml gives to the ranks."""

    @property
    def world_size(self) -> int:
        """Count the ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def job(self) -> JobDirectory:
        """Return where the job is kept."""
        return JobDirectory.of(self.run)

    def job_of(self, task: int | None) -> JobDirectory:
        """Return the job directory of an array's task; of the plan itself where there is none."""
        return self.job if task is None or self.tasks is None else JobDirectory.of(self.tasks[task].run)

    def cancellation_of(self, task: int | None) -> Cancellation | None:
        """Return whose wish ends an array's task: its own, or that of the whole array, which may be older than it."""
        return self.job_of(task).cancelled() or self.job.cancelled()

    def arguments_of(self, task: int | None) -> tuple[str, ...]:
        """Return what the ranks of an array's task are given."""
        if task is None or self.tasks is None:
            return self.arguments
        flags = (word for name, value in self.tasks[task].overrides.items() for word in (f"--{name}", _flag(value)))
        return (*self.arguments, *flags)

    def save(self) -> None:
        """Write plan.json."""
        self.job.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.job.plan, {"version": _VERSION} | _plain(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read plan.json. Raises `InputError` where it is none, or of another version."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("version") != _VERSION:
                raise InputError(f"{path}: was written by another version of signscale; launch the job again")
            tasks = content.pop("tasks")
            return cls(
                run=Path(content.pop("run")),
                command=tuple(content.pop("command")),
                arguments=tuple(content.pop("arguments")),
                # Older plans have none.
                sweep=tuple(content.pop("sweep", ())),
                snapshot=Path(snapshot) if (snapshot := content.pop("snapshot")) else None,
                code=Code(**content.pop("code")),
                tasks=None
                if tasks is None
                else tuple(Task(run=Path(t["run"]), overrides=t["overrides"]) for t in tasks),
                **content,
            )
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); launch the job again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: is no plan of a job ({error}); launch the job again") from error


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
