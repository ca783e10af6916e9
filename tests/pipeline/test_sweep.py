"""A sweep: every combination checked before anything starts, a folder each, and a table at any time."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest

from launch.cli import run
from launch.sweep.axes import folder_name, make_tasks, parse_axes
from launch.sweep.start import _array
from launch.sweep.table import format_table, publish, read_rows, record
from trainer.errors import InputError
from trainer.job.directory import AttemptRecord, JobDirectory, Word

TRAIN = ["--data_dir", "corpus", "--output_dir", "out"]


def test_every_combination_is_a_run_of_its_own() -> None:
    tasks = make_tasks(TRAIN, parse_axes(["learning_rate=1e-4,3e-4", "streams={a: [0, 1]},{a: [0, 2], b: [2, 3]}"]))
    assert [task.settings["learning_rate"] for task in tasks] == ["1e-4", "1e-4", "3e-4", "3e-4"]
    assert tasks[1].settings["streams"] == "{a: [0, 2], b: [2, 3]}"
    assert len({task.run for task in tasks}) == 4
    assert all(task.run.parent == Path("out") for task in tasks)
    assert tasks[0].words == ["--learning_rate=1e-4", "--streams={a: [0, 1]}", f"--output_dir={tasks[0].run}"]


@pytest.mark.parametrize("value", ["../../x", "a b", "$(id)", "x" * 300, "ä", ".", "\n"])
def test_folders_have_safe_names(value: str) -> None:
    name = folder_name({"annotations": value})
    assert len(name) <= 120
    assert "/" not in name
    assert name.isascii()
    assert not set(name) & set(" $()\n'\"")
    assert name != folder_name({"annotations": value + "1"})


def test_plain_settings_are_the_folder_name() -> None:
    assert folder_name({"learning_rate": "1e-4", "dropout": "0.2"}) == "learning_rate=1e-4,dropout=0.2"


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InputError) as refused:
        parse_axes(["dropot=0.1", "output_dir=a,b", "dropout", "dropout=", "seed=1", "seed=2"])
    found = refused.value.problems
    assert "did you mean dropout?" in found[0]
    assert "output_dir cannot be swept" in found[1]
    assert "expected KEY=VALUE,VALUE" in found[2]
    assert "expected KEY=VALUE,VALUE" in found[3]
    assert "seed is swept twice" in found[4]
    with pytest.raises(InputError) as refused:
        make_tasks([*TRAIN, "--seed=3"], parse_axes(["dropout=0.1,0.10,x,2", "seed=1,2"]))
    found = refused.value.problems
    assert found[0] == "--sweep seed: --seed is given too; drop that"
    assert found[1] == "--sweep dropout: 0.10 stands there twice; drop one"
    assert "--sweep dropout: " in found[2]
    assert "'x'" in found[2]
    assert "--sweep dropout: " in found[3]
    assert len(found) == 4


def test_impossible_combinations_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["--sweep", "learning_rate=1e-3,1e-9", "--sweep", "seed=1,2"]
    with pytest.raises(InputError) as refused:
        run(["launch", "slurm", *sweep, "--", "train", *TRAIN])
    assert refused.value.problems == (
        "learning_rate 1e-9, seed 1: min_lr: 1e-06 is above learning_rate 1e-09; lower it",
    )
    with pytest.raises(InputError, match="--sweep: sweeps a training"):
        run(["launch", "slurm", *sweep, "--", "evaluate", "--checkpoint", "x"])
    with pytest.raises(InputError, match="the sweep has 2 runs, 0 to 1"):
        run(["launch", "slurm", "--array", "1-2", "--sweep", "seed=1,2", "--", "train", *TRAIN])
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["--sweep", "learning_rate=1e-3,1e-4", "--sweep", "dropout=0.1,0.2"]
    end(tmp_path / "out" / "learning_rate=1e-3,dropout=0.2", "DONE")
    assert run(["launch", "slurm", *sweep, "--array", "%2", "--dry_run", "--", "train", *TRAIN]) == 0
    shown = capsys.readouterr().out
    assert "sweep of 4 runs in out, 1 of them done" in shown
    # The one that is done is not done again.
    assert "#SBATCH --array=0,2,3%2\n" in shown
    assert not (tmp_path / "out" / "job").exists()


def test_the_array_is_what_was_asked_for_or_what_is_left() -> None:
    assert _array("", 4, [0, 1, 3]) == "0,1,3"
    assert _array("%2", 4, [0, 3]) == "0,3%2"
    assert _array("0-3:2%1", 4, [0]) == "0-3:2%1"


def test_status_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it names starts what is not done by then, as the first command did."""
    # A cluster that takes every job and has forgotten it at once.
    for tool, said in (("sbatch", "echo 17"), ("sinfo", ""), ("squeue", ""), ("sacct", "")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    streams = "streams={a: [0, 1]},{a: [0, 2], b: [2, 3]}"
    sweep = ["--sweep", "learning_rate=1e-3,1e-4", "--sweep", streams, "--array", "%2", "--mem", "4G"]
    assert run(["launch", "slurm", *sweep, "--", "train", *TRAIN]) == 0
    script = out / "job" / "job.sh"
    assert "#SBATCH --array=0,1,2,3%2\n" in script.read_text()
    folders = [Path(task["run"]) for task in json.loads((out / "sweep.json").read_text())["tasks"]]
    end(folders[2], "DONE")
    capsys.readouterr()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run(["status", str(out)]) == 0
    first, second = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    assert first.endswith("# start those that are not done, each where it was")
    assert second.strip() == f"signscale sweep {out}  # the runs, best first"
    words = shlex.split(first, comments=True)
    assert words[:3] == ["signscale", "launch", "slurm"]
    assert f"--sweep={streams}" in words
    # One of its runs names the same.
    assert run(["status", str(folders[0])]) == 0
    assert words == shlex.split(capsys.readouterr().out.partition("next:\n")[2].splitlines()[0], comments=True)
    # While another of them is at work it would be refused.
    at_work = ["18", "17", "1", "RUNNING", "None", "N/A", "N/A", "0:10", "1:00:00", "", "(null)", str(script)]
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(chr(31).join(at_work))}\n")
    assert run(["status", str(folders[0])]) == 0
    assert "signscale launch" not in capsys.readouterr().out
    squeue.write_text("#!/bin/sh\n")
    assert run(words[1:]) == 0
    assert "#SBATCH --array=0,1,3%2\n" in script.read_text()
    assert "#SBATCH --mem=4G\n" in script.read_text()
    for folder in folders:
        end(folder, "DONE")
    capsys.readouterr()
    assert run(["status", str(out)]) == 0
    assert capsys.readouterr().out.partition("next:\n")[2].split("#")[0].strip() == f"signscale sweep {out}"


def test_the_table_is_kept_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.local.run", lambda plan: end(plan.run, "DONE", {10: 50.0}))
    assert run(["launch", "local", "--cpu", "--sweep", "seed=1,2", "--", "train", *TRAIN]) == 0
    assert "2 of 2 runs are done" in (tmp_path / "out" / "sweep.txt").read_text()


def test_a_sweep_that_was_started_here_is_no_run(tmp_path: Path) -> None:
    record(tmp_path, [(tmp_path / "a", {"seed": "1"})])
    with pytest.raises(InputError, match=f"signscale sweep {tmp_path}"):
        run(["status", str(tmp_path)])


def end(run: Path, word: Word, wers: dict[int, float] | None = None, reason: str = "finished") -> None:
    """Leave what a run leaves."""
    job = JobDirectory.of(run)
    job.begin(AttemptRecord(attempt="1.0", began=time.time()))
    job.leave_word(word, attempt="1.0", step=None, reason=reason)
    rows = [{"step": step, "val/wer": wer} for step, wer in (wers or {}).items()] + [{"step": 99, "train/loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10')


def test_the_table_has_the_best_run_first(tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("a", "b", "c", "d")}
    record(tmp_path, [(folder, {"seed": name}) for name, folder in runs.items()])
    end(runs["a"], "DONE", {10: 50.0, 20: 30.0, 30: 40.0})
    end(runs["b"], "DONE", {10: 20.0})
    end(runs["c"], "FAILED", reason="no more disk")
    assert [(row.settings["seed"], row.wer, row.best_step) for row in read_rows(tmp_path)] == [
        *(("b", 20.0, 10), ("a", 30.0, 20)),
        *(("c", None, None), ("d", None, None)),
    ]
    # One is still waiting: the table is kept, and not announced.
    assert publish(tmp_path) is None
    assert "FAILED: no more disk" in (tmp_path / "sweep.txt").read_text()
    end(runs["d"], "DONE", {5: 10.0})
    table = publish(tmp_path)
    assert table is not None
    assert table.splitlines()[1].split() == ["d", "10.00", "%", "5", "99", "DONE"]
    assert table.splitlines()[-1] == f"3 of 4 runs are done; best so far: {runs['d']}"
    # A second sweep in the same folder adds to it.
    record(tmp_path, [(tmp_path / "e", {"dropout": "0.1"})])
    assert len(read_rows(tmp_path)) == 5
    assert format_table(read_rows(tmp_path)).splitlines()[0].split()[:2] == ["seed", "dropout"]


def test_a_folder_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sweep\.json: there is none; name the output_dir of a sweep"):
        run(["sweep", str(tmp_path)])
