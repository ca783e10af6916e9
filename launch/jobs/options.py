"""Options of `signscale launch`: those of every way, and those of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.jobs.fields import add_flags
from launch.jobs.plan import Way
from launch.slurm.options import SlurmOptions, check
from launch.slurm.profile import find_profile, merge, read_profile
from trainer.errors import InputError
from trainer.options import OptionParser


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every way of launching takes."""

    name: str = ""
    """Name of the job (default: that of the run's folder; of a batch job with six digits that no other run has)."""
    run: str = ""
    """Folder that the job of `-m MODULE …` is kept in; other commands say themselves where they write."""
    accelerate_config: str = ""
    """Configuration of accelerate: a name in accelerate_configs/, or a path (default: the one that fits)."""
    launcher: Literal["accelerate", "plain"] = "accelerate"
    """plain: processes with RANK and WORLD_SIZE and nothing else, for a module without torch."""
    max_attempts_without_progress: int = 3
    """Of a batch job: attempts in a row that saved no new step, after which it is given up."""
    meeting_seconds: int = 120
    """Of a batch job: how long the nodes of an attempt wait for one another at its start."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """What a launch on this machine takes."""

    processes: int = 0
    """Ranks (default: one per visible GPU; one without GPUs)."""
    cpu: bool = False
    """Leave GPUs alone."""


@dataclass(frozen=True, kw_only=True)
class DebugOptions:
    """What a debugging run takes."""

    batches: int = 2
    """Global batches of each phase."""
    stop_at_failure: bool = False
    """Enter the debugger in the frame that failed (also: --break)."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """All that was said before `--`."""

    common: CommonOptions = field(default_factory=CommonOptions)
    local: LocalOptions = field(default_factory=LocalOptions)
    debug: DebugOptions = field(default_factory=DebugOptions)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    profile: str | None = None
    """File that the batch job's options were completed from."""
    dry_run: bool = False
    sweep: tuple[str, ...] = ()
    """KEY=VALUE,VALUE each: every combination is a run of its own."""


_KINDS: dict[Way, tuple[type[Any], str]] = {
    "debug": (DebugOptions, "debugging"),
    "local": (LocalOptions, "this machine"),
    "slurm": (SlurmOptions, "the batch job (as sbatch's options of the same names)"),
}


def make_parser(way: Way) -> OptionParser:
    """Build the parser of one way of launching."""
    parser = OptionParser(
        prog=f"signscale launch {way}",
        usage=f"signscale launch {way} [options] -- COMMAND [its options]",
        description="COMMAND is train, evaluate, extract, or -m MODULE. Dashes in option names may be typed for _.",
    )
    script = " and the job script" if way == "slurm" else ""
    parser.add_argument("--dry_run", action="store_true", help=f"print the plan{script}; start nothing")
    if way != "debug":
        parser.add_argument(
            "--sweep",
            action="append",
            metavar="KEY=VALUE,VALUE",
            help="train with each value of a setting; given again, with each combination (a job array on a cluster)",
        )
    if way == "slurm":
        parser.add_argument("--profile", help="options of a cluster: a name in ~/.config/signscale/clusters, or a path")
    add_flags(parser, CommonOptions, "the job")
    kind, title = _KINDS[way]
    add_flags(parser, kind, title)
    return parser


def parse_options(way: Way, argv: Sequence[str]) -> LaunchOptions:
    """Parse what stands before `--`. Raises `InputError` with every mistake."""
    given = vars(make_parser(way).parse([_with_underscores(word) for word in argv]))

    def pick(kind: type[Any]) -> dict[str, Any]:
        return {one.name: given[one.name] for one in dataclasses.fields(kind) if one.name in given}

    common = CommonOptions(**pick(CommonOptions))
    if min(common.max_attempts_without_progress, common.meeting_seconds) < 1:
        raise InputError("--max_attempts_without_progress, --meeting_seconds: expected 1 or more")
    options = LaunchOptions(common=common, dry_run=given["dry_run"], sweep=tuple(given.get("sweep") or ()))
    if way == "slurm":
        profile = find_profile(given["profile"])
        slurm = merge(read_profile(profile) if profile else {}, pick(SlurmOptions))
        check(slurm)
        return dataclasses.replace(options, slurm=slurm, profile=str(profile) if profile else None)
    if way == "local":
        local = LocalOptions(**pick(LocalOptions))
        if local.processes < 0:
            raise InputError(f"--processes {local.processes}: expected 1 or more")
        return dataclasses.replace(options, local=local)
    debug = DebugOptions(**pick(DebugOptions))
    if debug.batches < 1:
        raise InputError(f"--batches {debug.batches}: expected 1 or more")
    return dataclasses.replace(options, debug=debug)


def _with_underscores(word: str) -> str:
    if word == "--break":
        return "--stop_at_failure"
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
