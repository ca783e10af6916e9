"""`signscale compare`: runs side by side, a student beside its teacher: word error rate, size, speed, target."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.describe import add_measuring_options, read_model
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.options import OptionParser

# What needs torch is imported once the command line is known to be right.
if TYPE_CHECKING:
    from launch.describe import Described
    from trainer.models.figures import Figures

_DECODING = ("protocol", "decoder", "beam_width", "lm", "lm_weight", "lm_insertion")
"""What an evaluation says of how it came by its WER: where this differs, the WERs cannot be compared."""


def main(argv: Sequence[str]) -> int:
    """Print the table; return 1 where `--require_target` is given and a run misses it."""
    options = parse_options(argv)
    evaluations = read_evaluations(options.runs, options.split)
    models = _read_models(options.runs)
    from trainer.models.figures import measure

    figures = measure(
        [model.subject for model in models], seconds=options.seconds, fps=options.fps, timed=options.measure
    )
    report = make_report(options, evaluations, models, figures)
    print(json.dumps(report, indent=1, allow_nan=False) if options.json else _format(report))
    missed = any(met is False for row in report["runs"] for met in row["target_met"].values())
    return 1 if options.require_target and missed else 0


def read_evaluations(runs: Sequence[Path], splits: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
    """Read what `signscale evaluate` wrote of each split of each run.

    Raises `InputError` with every run that does not exist or was not evaluated, and every split on which the runs were
    not scored alike.
    """
    problems: list[str] = []
    found: list[dict[str, dict[str, Any]]] = []
    for run in runs:
        if not run.is_dir():
            problems.append(f"{run}: expected a run directory, found none; mend the path")
            continue
        reports = {split: _read_evaluation(run, split, problems) for split in splits}
        found.append({split: report for split, report in reports.items() if report is not None})
    if not problems:
        for split in splits:
            problems += _differences(split, runs, [reports[split] for reports in found])
    if problems:
        raise InputError(problems)
    return found


def _read_evaluation(run: Path, split: str, problems: list[str]) -> dict[str, Any] | None:
    path = run / "evaluation" / f"{split}.json"
    command = f"signscale evaluate --checkpoint {run} --split {split}"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Named here, so that a file of another kind is found out now.
        return {name: report[name] for name in ("wer", "step", "clips", "reference_words")} | report
    except FileNotFoundError:
        problems.append(f"{path}: the run was not evaluated on {split}; run `{command}` first")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); mend its rights")
    except (ValueError, KeyError, TypeError):
        problems.append(f"{path}: expected what signscale evaluate writes, found something else; run `{command}` again")
    return None


def _differences(split: str, runs: Sequence[Path], reports: Sequence[dict[str, Any]]) -> list[str]:
    first = reports[0]
    problems: list[str] = []
    for run, report in zip(runs[1:], reports[1:], strict=True):
        for name in (*_DECODING, "clips", "reference_words"):
            if first.get(name) != report.get(name):
                problems.append(
                    f"{run}: {split} was evaluated with {name} {report.get(name)!r}, that of {runs[0]} with "
                    f"{first.get(name)!r}, so that their WERs do not compare; evaluate both alike (signscale evaluate "
                    "--help)"
                )
    return problems


def _read_models(runs: Sequence[Path]) -> list[Described]:
    models: list[Described] = []
    problems: list[str] = []
    for run in runs:
        try:
            models.append(read_model(run))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return models


def make_report(
    options: argparse.Namespace,
    evaluations: Sequence[dict[str, dict[str, Any]]],
    models: Sequence[Described],
    figures: Sequence[Figures],
) -> dict[str, Any]:
    """Put together what is printed; targets are `target_ratio` times the WERs of the first run."""
    targets = {
        split: None if report["wer"] is None else options.target_ratio * report["wer"]
        for split, report in evaluations[0].items()
    }
    rows, notes = [], []
    for index, (run, reports, model, cost) in enumerate(zip(options.runs, evaluations, models, figures, strict=True)):
        wer = {split: report["wer"] for split, report in reports.items()}
        rows.append(
            {
                "run": str(run),
                "model": model.recipe.model.model,
                "wer": wer,
                "parameters": cost.parameters,
                "flops_per_second": cost.flops_per_second,
                "real_time_factor": cost.real_time_factor,
                # The first run is the measure, and has nothing to meet.
                "target_met": {} if index == 0 else {split: _is_met(wer[split], targets[split]) for split in wer},
            }
        )
        notes += [
            f"{run}: {split} was evaluated at step {report['step']}, but the run's best checkpoint is now that of step "
            f"{model.step}; evaluate it again"
            for split, report in reports.items()
            if report["step"] != model.step
        ]
    return {"target_ratio": options.target_ratio, "target_wer": targets, "runs": rows, "notes": notes}


def _is_met(wer: float | None, target: float | None) -> bool | None:
    """Compare; None where a WER is undefined, for want of reference words."""
    # 1.1 x 10 is a little more than 11 in floating point, and may be a little less.
    return None if wer is None or target is None else wer <= target + 1e-9


def _format(report: dict[str, Any]) -> str:
    splits, ratio = list(report["target_wer"]), report["target_ratio"]
    columns = [f"{split} <= {ratio:g} x" for split in splits]
    table = [
        ("run", "model", *(f"WER {split}" for split in splits), "parameters", "GFLOP/s", "real-time factor", *columns)
    ]
    for row in report["runs"]:
        speed = row["real_time_factor"]
        table.append(
            (
                row["run"],
                row["model"],
                *(_percent(row["wer"][split]) for split in splits),
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['flops_per_second'] / 1e9:.3f}",
                "-" if speed is None else f"{speed:.4f}",
                *(_verdict(row["target_met"].get(split, "")) for split in splits),
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
            + [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        ).rstrip()
        for line in table
    ]
    targets = ", ".join(f"{split} {_percent(wer)}" for split, wer in report["target_wer"].items())
    lines += [
        "",
        f"Target: {ratio:g} times the WER of the first run or less, that is {targets}. GFLOP/s: per second of video.",
    ]
    if any(row["real_time_factor"] is not None for row in report["runs"]):
        lines.append("Real-time factor: seconds of computing per second of video, on one thread of this machine's CPU.")
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def _percent(wer: float | None) -> str:
    return "undefined" if wer is None else f"{wer:.2f} %"


def _verdict(met: bool | str | None) -> str:
    if isinstance(met, str):
        return met
    return {None: "undefined", True: "met", False: "missed"}[met]


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="signscale compare",
        description="Runs side by side: WER of what signscale evaluate found, size, operations and time on one CPU "
        "thread, and whether each run stays within a ratio of the first one's WER.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories, the teacher first")
    add("--split", nargs="+", default=["dev", "test"], metavar="SPLIT", help="splits to compare (default: dev test)")
    add(
        "--target_ratio",
        type=float,
        default=1.1,
        metavar="R",
        help="a run meets the target with at most R times the WER of the first run (default: 1.1)",
    )
    add("--require_target", action="store_true", help="exit code 1 where a run misses the target on a split")
    add_measuring_options(parser)
    add("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse(argv)
    problems = []
    if not 0 < options.target_ratio < float("inf"):
        problems.append(f"--target_ratio {options.target_ratio}: expected a number above 0; 1.1 is usual")
    if len(options.runs) < 2:
        problems.append(f"{options.runs[0]}: expected two runs or more to compare, found one; name another")
    problems += [f"--split {split}: is named twice; name it once" for split in _twice(options.split)]
    problems += [f"{run}: is named twice; name it once" for run in _twice(options.runs)]
    if problems:
        raise InputError(problems)
    return options


def _twice(names: Sequence[Any]) -> list[Any]:
    return sorted({name for name in names if list(names).count(name) > 1})


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
