"""Commands within a job: what each of them tells it when it is asked to stop, and what it refuses beside it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, reset_process
from tests.job.test_rank import hold
from tests.publishing import publish
from trainer import extract as extraction
from trainer.engine import Processes
from trainer.errors import InputError, TrainingFailedError
from trainer.evaluate import main as evaluate
from trainer.exits import Outcome
from trainer.extract import main as extract
from trainer.job import rank
from trainer.job.directory import ATTEMPT, END_TIME, JOB, TOKEN, AttemptRecord, JobDirectory
from trainer.recipe import RunRecipe
from trainer.softtargets.store import ShardFolder
from trainer.train import main as train

STEPS = ["--max_steps", "8", "--log_every", "1", "--evaluate_every", "8", "--num_workers", "0"]


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a run does to its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    reset_process()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def begin(monkeypatch: pytest.MonkeyPatch, run: Path, attempt: str, **more: str) -> JobDirectory:
    """Make this process a rank of an attempt at a run."""
    reset_process()
    directory = JobDirectory.of(run)
    directory.begin(AttemptRecord(attempt=attempt, began=time.time()))
    for name, value in {JOB: str(directory.folder), ATTEMPT: attempt, TOKEN: "t", **more}.items():
        monkeypatch.setenv(name, value)
    return directory


def end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a plain process again."""
    reset_process()
    for name in (JOB, ATTEMPT, TOKEN, END_TIME):
        monkeypatch.delenv(name, raising=False)


def say(outcome: int) -> tuple[int, str, int | None]:
    assert isinstance(outcome, Outcome)
    return int(outcome), outcome.word, outcome.step


def then(function: Callable[..., Any], afterwards: Callable[[], None]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        result = function(*arguments)
        afterwards()
        return result

    return both


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("teacher") / "run", corpus, *TINY)


def test_training_against_the_clock_saves_in_time_and_gets_somewhere(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--data_dir", str(corpus), "--output_dir", str(run), *TINY, *STEPS, "--resume", "auto"]
    begin(monkeypatch, run, "7.0")
    assert say(train([*flags, "--stop_after_steps", "2"])) == (0, "RESUME", 2)
    # As late as can be: the one step that it is in the middle of when it looks is done, and saved.
    begin(monkeypatch, run, "7.1", **{END_TIME: str(time.time() - 1)})
    outcome = train(flags)
    assert say(outcome) == (0, "RESUME", 3)
    assert outcome.reason.startswith("stopped before the time limit: -")
    assert outcome.reason in capfd.readouterr().out
    assert json.loads((run / "checkpoints" / "last.json").read_text())["checkpoint"] == "step-000000003"
    begin(monkeypatch, run, "7.2", **{END_TIME: str(time.time() + 86400)})
    assert say(train(flags)) == (0, "DONE", 8)


def test_a_goal_that_was_missed_is_an_end_all_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    begin(monkeypatch, run, "7.0")
    outcome = train(["--data_dir", str(corpus), "--output_dir", str(run), *TINY, *STEPS, "--target_wer", "0"])
    assert say(outcome) == (1, "DONE", 8)
    assert "target WER 0.0 % NOT reached" in outcome.reason


def test_a_plain_command_is_refused_while_a_job_or_another_command_works_on_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    flags = ["--data_dir", str(corpus), "--output_dir", str(run), *TINY, *STEPS]
    job = begin(monkeypatch, run, "7.0")
    end(monkeypatch)
    with pytest.raises(InputError, match=r"attempt 7.0 of its job has begun and not ended; .*signscale status"):
        train(flags)
    assert [path.name for path in run.iterdir()] == ["job"]
    job.end("7.0", step=None, word=None, reason="ended by a test")
    reset_process()
    train([*flags, "--stop_after_steps", "1"])
    holder = hold(run)
    try:
        reset_process()
        with pytest.raises(InputError, match=rf"process {holder.pid} on .* works on this run"):
            train([*flags, "--resume", "auto"])
    finally:
        holder.kill()
        holder.wait()
    reset_process()
    assert say(train([*flags, "--resume", "auto", "--stop_after_steps", "1"])) == (0, "RESUME", 2)


def test_anomaly_detection_is_on_where_the_recipe_asks_for_it() -> None:
    try:
        Processes(RunRecipe(detect_anomaly=True))
        assert torch.is_anomaly_enabled()
    finally:
        torch.autograd.set_detect_anomaly(False)


def test_an_evaluation_that_is_stopped_writes_no_report(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "evaluation"
    flags = ["--checkpoint", str(teacher), "--split", "dev", "--output_dir", str(out), "--num_workers", "0"]
    begin(monkeypatch, out, "7.0").request_stop("asked by a test")
    outcome = evaluate(flags)
    assert say(outcome) == (1, "RESUME", None)
    assert outcome.reason.startswith("stopped on request (asked by a test); dev was not evaluated")
    assert not (out / "dev.json").exists()
    begin(monkeypatch, out, "7.1")
    assert say(evaluate(flags)) == (0, "DONE", 2)
    assert (out / "dev.json").exists()


def test_an_evaluation_whose_job_was_taken_over_writes_no_report(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "evaluation"
    begin(monkeypatch, out, "7.0")
    JobDirectory.of(out).begin(AttemptRecord(attempt="7.1", began=time.time()))
    with pytest.raises(TrainingFailedError, match="taken over"):
        evaluate(["--checkpoint", str(teacher), "--split", "dev", "--output_dir", str(out), "--num_workers", "0"])
    assert [path.name for path in out.iterdir()] == ["job"]


def test_an_extraction_that_is_stopped_goes_on_where_it_was(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "targets"
    flags = ["--checkpoint", str(teacher), "--output", str(out), "--shard_clips", "10", "--num_workers", "0"]
    job, write = begin(monkeypatch, out, "7.0"), ShardFolder.write
    monkeypatch.setattr(ShardFolder, "write", then(ShardFolder.write, lambda: job.request_stop("asked by a test")))
    monkeypatch.setattr(rank, "_SECONDS_BETWEEN_LOOKS", 0.0)
    outcome = extract(flags)
    assert say(outcome) == (1, "RESUME", 1)
    assert outcome.reason.startswith("stopped on request (asked by a test) with 3 of 4 shards to go")
    assert not (out / "manifest.json").exists()
    # Once more, behind the last shard: the dev split is not evaluated to its end then.
    job = begin(monkeypatch, out, "7.1")
    assert say(extract(flags)) == (1, "RESUME", 2)
    monkeypatch.setattr(ShardFolder, "write", write)
    job = begin(monkeypatch, out, "7.2")
    monkeypatch.setattr(extraction, "_teacher_wer", then(extraction._teacher_wer, lambda: job.request_stop("again")))
    assert say(extract(flags)) == (1, "RESUME", 4)
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    begin(monkeypatch, out, "7.3")
    assert say(extract(flags)) == (0, "DONE", None)
    assert (out / "manifest.json").exists()
