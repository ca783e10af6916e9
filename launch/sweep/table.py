"""`signscale sweep OUT`: the runs of a sweep, best first. The batch job prints it too, so that it imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.files import write_json, write_text
from trainer.job.directory import JobDirectory

RECORD = "sweep.json"
TABLE = "sweep.txt"
"""In the sweep's folder: each run with its settings; the table, as it stood when the last attempt ended."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a sweep."""

    run: str
    settings: dict[str, str]
    wer: float | None
    """Best dev WER in percent, of all validations."""
    best_step: int | None
    step: int | None
    """Newest step of which there are metrics."""
    state: str
    """DONE, FAILED, RESUME (saved, to be gone on with), begun, or waiting."""
    reason: str


def read_rows(out: Path) -> list[Row]:
    """Read how the runs of a sweep stand, best dev WER first. Raises `InputError` where there is no sweep."""
    path = out / RECORD
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        rows = [_read_row(Path(task["run"]), dict(task["settings"])) for task in tasks]
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is none; name the output_dir of a sweep (signscale launch … --sweep)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no record of a sweep ({error}); launch the sweep again") from error
    return sorted(rows, key=lambda row: (row.wer is None, row.wer or 0.0, row.run))


def record(out: Path, tasks: Sequence[tuple[Path, dict[str, str]]]) -> None:
    """Add runs, with their settings, to the record of a sweep."""
    known = {str(run.absolute()): settings for run, settings in tasks}
    path = out / RECORD
    if path.exists():
        known = {row.run: row.settings for row in read_rows(out) if Path(row.run).exists()} | known
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"tasks": [{"run": run, "settings": settings} for run, settings in known.items()]})


def publish(out: Path) -> str | None:
    """Write the table to OUT/sweep.txt as it stands now; return it if no run will go on by itself."""
    rows = read_rows(out)
    text = format_table(rows)
    write_text(out / TABLE, text + "\n")
    return text if is_over(rows) else None


def is_over(rows: Sequence[Row]) -> bool:
    """Whether no run of the sweep will go on by itself."""
    return all(row.state in ("DONE", "FAILED") for row in rows)


def format_table(rows: Sequence[Row]) -> str:
    """Lay the runs out for a terminal."""
    # Sweeps over other settings may have come before, in the same folder.
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    table = [(*keys, "best dev WER", "at step", "step", "state")]
    for row in rows:
        wer = "-" if row.wer is None else f"{row.wer:.2f} %"
        state = row.state if row.state != "FAILED" else f"FAILED: {row.reason}"
        steps = ("-" if step is None else str(step) for step in (row.best_step, row.step))
        table.append((*(row.settings.get(key, "-") for key in keys), wer, *steps, state))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    last = len(widths) - 1
    lines = [
        "  ".join(cell if i == last else cell.rjust(widths[i]) for i, cell in enumerate(line)).rstrip()
        for line in table
    ]
    done = sum(row.state == "DONE" for row in rows)
    best = next((row for row in rows if row.wer is not None), None)
    lines.append(f"{done} of {len(rows)} runs are done" + (f"; best so far: {best.run}" if best else ""))
    return "\n".join(lines)


def _read_row(run: Path, settings: dict[str, str]) -> Row:
    job = JobDirectory.of(run)
    word = job.last_word()
    wer, best_step, step = _read_metrics(run / "metrics.jsonl")
    state = word.word if word else "begun" if job.history() else "waiting"
    return Row(
        run=str(run),
        settings=settings,
        wer=wer,
        best_step=best_step,
        step=step if step is not None or word is None else word.step,
        state=state,
        reason=word.reason if word else "",
    )


def _read_metrics(path: Path) -> tuple[float | None, int | None, int | None]:
    """Return the best dev WER, its step, and the newest step."""
    best: tuple[float, int] | None = None
    newest: int | None = None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    for number, line in enumerate(lines):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError as error:
            if number == len(lines) - 1:
                # Being written right now.
                break
            raise InputError(f"{path}:{number + 1}: expected a line of JSON ({error}); remove it") from error
        newest = int(row["step"])
        wer = row.get("val/wer")
        if wer is not None and (best is None or wer < best[0]):
            best = (float(wer), newest)
    return (best[0] if best else None), (best[1] if best else None), newest


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    from trainer.options import OptionParser

    parser = OptionParser(
        prog="signscale sweep",
        description="The runs of a sweep, best dev WER first, with their state. The sweep was started by "
        "`signscale launch local|slurm --sweep KEY=VALUE,VALUE -- train …`.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="output_dir of the sweep")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options: argparse.Namespace = parser.parse(argv)
    rows = read_rows(options.out)
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else format_table(rows))
    return 0


if __name__ == "__main__":
    from trainer.exits import exit_on_input_error

    exit_on_input_error(lambda: main(sys.argv[1:]))
