"""Trackers: every line is on disk and is JSON, whatever killed the attempt before; wandb never asks a question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.files import FencedFolder
from trainer.observe.trackers import METRICS, JsonLines, TensorBoard, open_trackers

ROOT = Path(__file__).parents[2]


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def rows(path: Path) -> list[dict[str, Any]]:
    """Read lines as strictly as any other language would: Python alone takes NaN for JSON."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


def log_steps(path: Path, *steps: int, after_step: int = -1, **more: Any) -> None:
    tracker = JsonLines(FencedFolder(path.parent), after_step=after_step)
    for step in steps:
        tracker.log({"step": step, "epoch": 0, **more})
    tracker.close()


# metrics.jsonl.


def test_each_line_is_an_object_and_on_disk_before_log_returns(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    tracker = JsonLines(FencedFolder(tmp_path), after_step=-1)
    for step in range(3):
        tracker.log({"step": step, "epoch": 0, "train/loss": 1 / 3})
        assert rows(path)[-1] == {"step": step, "epoch": 0, "train/loss": 1 / 3}
        assert len(rows(path)) == step + 1
    tracker.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    log_steps(tmp_path / METRICS, 1, loss=value)
    assert rows(tmp_path / METRICS) == [{"step": 1, "epoch": 0, "loss": None}]


def test_a_resumed_run_drops_the_steps_it_will_do_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    log_steps(path, 0, 10, 20, 30, 40)
    log_steps(path, 30, 40, after_step=20, attempt=2)
    assert [(row["step"], row.get("attempt")) for row in rows(path)] == [
        (0, None),
        (10, None),
        (20, None),
        (30, 2),
        (40, 2),
    ]


def test_a_run_that_starts_anew_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    log_steps(path, 0, 10)
    log_steps(path, 0, attempt=2)
    assert [row["attempt"] for row in rows(path)] == [2]


def test_wherever_the_last_line_was_cut_the_file_is_whole_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    log_steps(path, 1, 2, loss=0.125)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        log_steps(path, 3, after_step=2)
        # The second line stays if all of it was there, its line end or not.
        expected = [1, 2, 3] if cut >= len(whole) - 1 else [1, 3]
        assert [row["step"] for row in rows(path)] == expected, cut


def test_lines_that_are_no_objects_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\nnull\n[2]\n{"epoch": 1}\n{"step": null}\n\0\0\0\n')
    log_steps(path, 5, after_step=4)
    assert [row["step"] for row in rows(path)] == [1, 5]


# TensorBoard.


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, round(event.value, 5)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_files_read_back_and_a_resumed_run_replaces_its_later_steps(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, after_step=-1)
    for step in range(1, 6):
        first.log({"step": step, "epoch": 0, "train/loss": step / 4, "val/wer": None})
    first.close()
    second = TensorBoard(tmp_path, after_step=3)
    for step in range(4, 7):
        second.log({"step": step, "epoch": 1, "train/loss": step / 2, "val/wer": 50.0})
    second.close()
    read = scalars(tmp_path)
    assert read["train/loss"] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 2.0), (5, 2.5), (6, 3.0)]
    assert read["val/wer"] == [(4, 50.0), (5, 50.0), (6, 50.0)]
    assert read["epoch"] == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0)]


# Which ones are opened.


def test_metrics_are_always_kept_and_the_rest_as_the_recipe_says(tmp_path: Path) -> None:
    for names, kinds in (([], [JsonLines]), (["tensorboard"], [JsonLines, TensorBoard])):
        trackers = open_trackers(FencedFolder(tmp_path), names, after_step=-1, project="p", recipe={})
        assert [type(tracker) for tracker in trackers] == kinds
        for tracker in trackers:
            tracker.close()
    assert (tmp_path / "metrics.jsonl").exists()


# wandb.

_TWO_ATTEMPTS = """
import sys
from pathlib import Path
from trainer.files import FencedFolder
from trainer.observe.trackers import open_trackers
for attempt, steps in enumerate([(1, 2), (3,)]):
    trackers = open_trackers(
        FencedFolder(Path(sys.argv[1])),
        ["wandb"],
        after_step=attempt * 2 or -1,
        project="p",
        recipe={"betas": (0.9, 0.999)},
    )
    for step in steps:
        for tracker in trackers:
            tracker.log({"step": step, "epoch": 0, "val/loss": float("nan"), "val/wer": 50.0})
    for tracker in trackers:
        tracker.close()
"""


@pytest.mark.timeout(120)
def test_wandb_without_a_key_is_offline_asks_nothing_and_goes_on_with_its_record(tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    run.mkdir()
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC", "XDG"))}
    started = subprocess.run(
        [sys.executable, "-c", _TWO_ATTEMPTS, str(run)],
        env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        # Any question would meet the end of its input here.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert started.returncode == 0, started.stderr
    identifier = (run / "wandb_id").read_text()
    records = sorted((run / "wandb").glob("offline-run-*"))
    assert len(records) == 2
    assert all(f"-{identifier}" in record.name for record in records)
    assert all(list(record.glob("*.wandb")) for record in records)
    assert [row["step"] for row in rows(run / METRICS)] == [1, 2, 3]
