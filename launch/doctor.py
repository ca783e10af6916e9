"""`signscale doctor`: machines, corpus and run looked at on all ranks, before GPU hours are spent."""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.doctor.finding import Finding
from trainer.doctor.node import FINDINGS, Node, Options, own_name
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser, positive_count, positive_number
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from launch.slurm.options import SlurmOptions

_HEADINGS = ("check", "value", "verdict", "mend")
_NARROWEST, _WIDEST = 80, 200
_NOT_HERE = ("array", "requeue", "preflight")
"""Options of a batch job that an examination, one job that is looked at once, has no use for."""


def main(argv: Sequence[str]) -> int:
    """Print what was found; return 1 where something would break training. Raises `InputError` for a user's mistake."""
    if "--preflight" in argv:
        from launch.preflight import main as preflight

        return preflight([word for word in argv if word != "--preflight"])
    options, words, recipe = _parse(argv)
    asked = _examination(options, words, recipe)
    if options.on == "slurm":
        from launch.doctor_slurm import examine_on_slurm

        found = examine_on_slurm(_job_folder(options, recipe), asked, _slurm_options(options))
    else:
        with _report_folder(options) as report:
            asked.write(report)
            Node(report, asked, index=0, name=own_name()).examine()
            found = json.loads((report / FINDINGS).read_text(encoding="utf-8"))
    print(json.dumps(found, indent=1, ensure_ascii=False) if options.json else format_findings(found))
    return 0 if found["ok"] else 1


def format_findings(found: dict[str, Any], *, width: int | None = None) -> str:
    """Lay findings out as one table, long values and mends broken to lines."""
    findings = [Finding.from_json(one) for one in found["findings"]]
    width = min(_WIDEST, max(_NARROWEST, width or shutil.get_terminal_size((140, 24)).columns))
    first = max(len(_HEADINGS[0]), *(len(one.check) for one in findings))
    verdict = len(_HEADINGS[2])
    rest = width - first - verdict - 6
    widths = (first, rest - rest // 3, verdict, rest // 3)
    rows = [_HEADINGS, *((one.check, one.value, one.verdict, one.mend) for one in findings)]
    lines = [line for row in rows for line in _wrap(row, widths)]
    counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in ("FAIL", "warn", "skipped", "ok")}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return "\n".join([*lines, "", summary])


def _wrap(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    cells = [textwrap.wrap(text, size, break_on_hyphens=False) for text, size in zip(row, widths, strict=True)]
    for number in range(max(map(len, cells))):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        yield "  ".join(part.ljust(size) for part, size in zip(parts, widths, strict=True)).rstrip()


@contextlib.contextmanager
def _report_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Give the nodes a folder to tell each other in: kept where the user names one, and gone afterwards otherwise."""
    if options.report:
        if options.report.exists() and (not options.report.is_dir() or any(options.report.iterdir())):
            raise InputError(f"--report: {options.report} is there already; name a new or empty folder")
        options.report.mkdir(parents=True, exist_ok=True)
        yield options.report.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="signscale-doctor-") as folder:
        yield Path(folder)


def _job_folder(options: argparse.Namespace, recipe: Recipe | None) -> Path:
    """Return the new folder of a batch job and its report: in the run's, or in runs/ of the current folder."""
    if options.report:
        if options.report.exists():
            raise InputError(f"--report: {options.report} is there already; name a new folder")
        return Path(options.report.absolute())
    runs = Path(recipe.run.output_dir) if recipe else Path("runs")
    return (runs / "doctor" / time.strftime("%Y-%m-%d-%H%M%S")).absolute()


def _examination(options: argparse.Namespace, words: Sequence[str], recipe: Recipe | None) -> Options:
    from launch.prepare import find_accelerate_config

    run = Path(recipe.run.output_dir) if recipe else Path.cwd()
    return Options(
        run=str(run.absolute()),
        token=secrets.token_hex(16),
        ranks_per_node=options.processes or 0,
        accelerate_config=str(find_accelerate_config(options.accelerate_config)) if options.accelerate_config else "",
        cpu=options.cpu,
        recipe=tuple(words) if recipe else None,
        patience=options.patience,
        limit=options.limit,
    )


def _slurm_options(options: argparse.Namespace) -> SlurmOptions:
    """Take the batch job's options, completed from the cluster's profile."""
    from launch.slurm.options import FIELDS, check
    from launch.slurm.profile import find_profile, merge, read_profile

    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    profile = find_profile(options.profile)
    slurm = merge(read_profile(profile) if profile else {}, given)
    check(slurm)
    return slurm


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], Recipe | None]:
    # Options of a batch job have dashes or underscores, as in sbatch and here.
    argv = [_with_underscores(word) for word in argv]
    parser = OptionParser(
        prog="signscale doctor",
        description="Look at machines, corpus and run on all ranks, before GPU hours are spent.",
        epilog="Takes --config FILE and every flag of `signscale train` too; without any, the machines alone are "
        "looked at. Exit code 1 if anything would break training, 2 for a mistake in the command.",
    )
    add = parser.add_argument
    add("--on", choices=("local", "slurm"), default="local", help="where to look (default: this machine)")
    add("--json", action="store_true", help="print one JSON document in place of the table")
    add("--processes", type=positive_count, metavar="N", help="ranks (default: one a device, one on a CPU)")
    add("--cpu", action="store_true", help="keep to the CPU where there are devices")
    add("--accelerate_config", metavar="YAML", help="launch configuration of the ranks (default: what fits)")
    add("--report", type=Path, metavar="DIR", help="new folder that keeps all findings and the ranks' output")
    add("--patience", type=positive_number, default=60.0, metavar="S", help="seconds nodes wait for each other (60)")
    add("--limit", type=positive_number, default=1800.0, metavar="S", help="seconds the ranks may take (1800)")
    from launch.jobs.fields import add_flags
    from launch.slurm.options import SlurmOptions

    title = "with --on slurm, the batch job (as sbatch's options of the same names)"
    add_flags(parser, SlurmOptions, title, without=_NOT_HERE)
    add("--profile", help="with --on slurm: options of a cluster, as in `signscale launch slurm`")
    # Imported here: it takes half a second that no other command needs.
    from trainer.parsing import parse_recipe

    options, rest = parser.parse_beside_recipe(argv)
    problems = _option_problems(options)
    recipe = None
    try:
        recipe = parse_recipe(rest, parser.prog) if rest else None
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    if recipe is not None:
        from launch.jobs.place import understand

        # Ranks of a batch job run in another folder.
        rest = list(understand(("train", *rest)).words[1:])
    return options, rest, recipe


def _option_problems(options: argparse.Namespace) -> list[str]:
    from launch.prepare import find_accelerate_config
    from launch.slurm.options import FIELDS

    problems = []
    if options.on == "local":
        given = [name for name in (*FIELDS, "profile") if getattr(options, name, None) is not None]
        problems += [f"--{name}: is for a batch job; add --on slurm, or drop it" for name in given]
    elif options.processes:
        problems.append("--processes: is for --on local; name --gpus_per_node or --ranks_per_node")
    if options.accelerate_config:
        try:
            find_accelerate_config(options.accelerate_config)
        except InputError as error:
            problems += error.problems
    return problems


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


if __name__ == "__main__":
    if "--preflight" in sys.argv:
        # No rank of the job: what it has to say is a file, and leaves no word.
        sys.exit(main(sys.argv[1:]))
    exit_on_input_error(lambda: main(sys.argv[1:]))
