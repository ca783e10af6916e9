"""Options of a batch job: one typed field each, which is also the flag and the key of a cluster's profile."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What is asked of the cluster, and what a node needs before the ranks can start."""

    nodes: int = 1
    """Nodes."""
    gpus_per_node: str = ""
    """GPUs of each node, a rank each: 4, or with a type, a100:4 (default: none, ranks compute on CPUs)."""
    ranks_per_node: int = 0
    """Ranks of each node (default: one per GPU; 1 without GPUs)."""
    cpus_per_task: int = 0
    """CPU cores of each rank (default: 4)."""
    mem: str = ""
    """Memory of each node: 64G; 0 is all of it (default: the partition's)."""
    mem_per_cpu: str = ""
    """Memory per core."""
    mem_per_gpu: str = ""
    """Memory per GPU."""
    time: str = ""
    """Time limit: minutes, H:MM:SS or D-HH:MM:SS (default: the partition's)."""
    partition: str = ""
    """Partition, or several with commas."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that nodes must have: 'a100&nvlink'."""
    exclude: str = ""
    """Nodes to stay away from: node[3,7-9]."""
    nodelist: str = ""
    """Nodes to run on."""
    reservation: str = ""
    """Reservation."""
    licenses: str = ""
    """Licenses."""
    exclusive: bool = False
    """Whole nodes, whatever is asked for of them."""
    nice: int = 0
    """Step back behind other jobs by this much."""
    mail_type: str = ""
    """When to send mail: END,FAIL."""
    mail_user: str = ""
    """Where mail goes."""
    comment: str = ""
    """A note that squeue and sacct can show."""
    clusters: str = ""
    """Other cluster to submit to; of several, separated by commas, the one that starts the job first."""
    array: str = ""
    """Of a sweep: which of its tasks, and how many at a time: 0-8%%4, or %%4 (default: all that are not done)."""
    signal_seconds: int = 180
    """Seconds before the time limit at which the job is told to save and leave."""
    requeue: bool = True
    """Go back into the queue after preemption, the time limit, or the loss of a node."""
    preflight: bool = False
    """Check the nodes first; a failing or slow one is excluded and the job goes back into the queue."""
    modules: tuple[str, ...] = ()
    """Modules to load; may be given again."""
    setup: tuple[str, ...] = ()
    """Shell lines to run before anything else, as they are; may be given again."""
    venv: str = ""
    """Virtual environment to activate (default: the interpreter that launches, by its path)."""
    conda: str = ""
    """Conda environment to activate, by name or path."""
    interpreter: str = ""
    """Python of the nodes (default: VENV's, or the one that launches)."""
    container: str = ""
    """Image in which ranks run: /path/image.sif or .sqsh, or registry#name:tag."""
    container_runtime: Literal["", "pyxis", "apptainer"] = ""
    """What runs it (default: apptainer for .sif, else pyxis)."""
    container_mounts: tuple[str, ...] = ()
    """Folders that are seen in it, besides the run's: FROM[:TO]; may be given again."""
    container_interpreter: str = "python3"
    """Python inside it."""
    export: str = "ALL"
    """Environment the job gets of yours: ALL, NONE, or names with commas (values never stand in the script)."""
    sbatch: tuple[str, ...] = ()
    """Any other option of sbatch: KEY=VALUE or KEY; may be given again."""

    @property
    def gpu_count(self) -> int:
        """Count the GPUs of a node."""
        return int(self.gpus_per_node.rpartition(":")[2] or 0)

    @property
    def ranks(self) -> int:
        """Count the ranks of a node."""
        return self.ranks_per_node or self.gpu_count or 1

    @property
    def cpus_per_rank(self) -> int:
        """Count the cores of a rank."""
        return self.cpus_per_task or 4

    @property
    def runtime(self) -> str:
        """Name what runs the container; empty without one."""
        if not self.container:
            return ""
        return self.container_runtime or ("apptainer" if self.container.endswith(".sif") else "pyxis")


FIELDS = {field.name: field for field in dataclasses.fields(SlurmOptions)}
OWN = {
    **dict.fromkeys(("output", "error", "open_mode"), "is the job's own: logs lie in RUN/job/logs"),
    **dict.fromkeys(("ntasks", "ntasks_per_node", "n"), "follows from --nodes: one launcher a node"),
    **dict.fromkeys(("chdir", "D", "job_name", "J"), "is the launcher's; the name is set by --name"),
    **dict.fromkeys(("dependency", "d", "parsable", "wrap", "test_only", "wait"), "is said at submission, not here"),
    **dict.fromkeys(("signal", "no_requeue", "input"), "is set by --signal_seconds and --no_requeue"),
    "export": "would put values, and with them keys, into the script; name the variables with --export NAME,NAME",
    **dict.fromkeys(
        ("G", "gpus", "gpus_per_task", "gpus_per_socket"),
        "the ranks would not know of the GPUs and compute on CPUs; use --gpus_per_node, which starts a rank for each",
    ),
}
"""Options of sbatch that extra lines may not set, and why."""

_ONCE = ("hold", "begin")
"""Options of sbatch that are meant for the first submission alone."""
_TIME = re.compile(r"^(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?$")
_PATTERNS = {
    "gpus_per_node": (r"(?:[A-Za-z0-9_.+\-]+:)?[1-9]\d*", "a count, or TYPE:COUNT such as a100:4"),
    "mem": (r"\d+[KMGT]?", "a size such as 64G"),
    "mem_per_cpu": (r"\d+[KMGT]?", "a size such as 4G"),
    "mem_per_gpu": (r"\d+[KMGT]?", "a size such as 80G"),
    "export": (r"ALL|NONE|(?:ALL,)?[A-Za-z_]\w*(?:,[A-Za-z_]\w*)*", "ALL, NONE or names of variables, without values"),
    "array": (r"\d[\d,\-:]*(?:%\d+)?|%\d+", "numbers such as 0-8%4"),
}


def seconds_of(time: str) -> int | None:
    """Read a time limit as sbatch does: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None where it is none."""
    match = _TIME.match(time)
    if not match:
        return None
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*given, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(given) == 3:
        return (given[0] * 60 + given[1]) * 60 + given[2]
    return given[0] * 60 + (given[1] if len(given) == 2 else 0)


def check(options: SlurmOptions) -> None:
    """Raise `InputError` with everything that no cluster could accept."""
    problems = list(_find_problems(options))
    if problems:
        raise InputError(problems)


def _find_problems(options: SlurmOptions) -> Iterator[str]:
    for name, value in dataclasses.asdict(options).items():
        for one in value if isinstance(value, tuple | list) else [value]:
            if isinstance(one, str) and (bad := has_control_characters(one)):
                yield f"--{name} {one!r}: holds {bad}, which no line of a batch script can; leave it out"
        if value and name in _PATTERNS and not re.fullmatch(_PATTERNS[name][0], str(value)):
            yield f"--{name} {value}: expected {_PATTERNS[name][1]}"
    for name in ("nodes", "signal_seconds"):
        if getattr(options, name) < 1:
            yield f"--{name} {getattr(options, name)}: expected 1 or more"
    for name in ("ranks_per_node", "cpus_per_task", "nice"):
        if getattr(options, name) < 0:
            yield f"--{name} {getattr(options, name)}: expected 0 or more"
    if sum(bool(size) for size in (options.mem, options.mem_per_cpu, options.mem_per_gpu)) > 1:
        yield "--mem, --mem_per_cpu, --mem_per_gpu: sbatch takes one of them; choose"
    if options.mem_per_gpu and not options.gpus_per_node:
        yield "--mem_per_gpu: there are no GPUs; add --gpus_per_node, or use --mem"
    if options.venv and options.conda:
        yield "--venv, --conda: one environment can be active; choose"
    for mount in options.container_mounts:
        if "," in mount or mount.count(":") > 2:
            yield f"--container_mounts {mount}: expected FROM, FROM:TO or FROM:TO:ro, without commas; give it again"
    if options.container_mounts and not options.container:
        yield "--container_mounts: there is no --container"
    if options.time and options.time.upper() not in ("UNLIMITED", "INFINITE"):
        seconds = seconds_of(options.time)
        if not seconds:
            yield f"--time {options.time}: expected minutes, H:MM:SS or D-HH:MM:SS"
        elif seconds <= options.signal_seconds + 60:
            # SLURM may signal a minute early: the job would be told to leave before it has begun.
            yield (
                f"--time {options.time}: is {seconds} s, and the job is told to save {options.signal_seconds} s before "
                "its end, up to a minute early; ask for more time, or lower --signal_seconds"
            )
    for extra in options.sbatch:
        value = extra.partition("=")[2]
        key = extra.lstrip("-").partition("=")[0].replace("-", "_").strip()
        if not re.fullmatch(r"[A-Za-z]\w*", key):
            yield f"--sbatch {extra!r}: expected KEY=VALUE, such as wckey=mine"
        elif key == "export":
            # Without its value, which may be the secret.
            yield f"--sbatch export=…: {OWN[key]}"
        elif key in OWN:
            yield f"--sbatch {extra}: {OWN[key]}"
        elif key in ("gres", "tres_per_task") and re.search(r"(?:^|[,/\s\"'])gpu(?:[:=,\s\"']|$)", value):
            yield f"--sbatch {extra}: {OWN['gpus']}"
        elif key in _ONCE and not options.requeue:
            yield (
                f"--sbatch {extra}: with --no_requeue the script is submitted anew after each attempt, and would be "
                "held up by this line again; leave one of them out, or use scontrol update after the launch"
            )
        elif key in FIELDS:
            yield f"--sbatch {extra}: is an option of its own, --{key}"


def has_control_characters(text: str) -> str:
    """Name the first control character of a text; empty where there is none."""
    found = [character for character in text if ord(character) < 32 or ord(character) in (0x7F, 0x85, 0x2028, 0x2029)]
    return "a line break" if found and found[0] in "\n\r\x85\u2028\u2029" else "a control character" if found else ""
