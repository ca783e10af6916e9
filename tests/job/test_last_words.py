"""Last words: what the next attempt goes by, since no exit code survives the launchers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment
from trainer.errors import InputError, TrainingFailedError
from trainer.exits import Outcome, exit_on_input_error
from trainer.job.directory import ATTEMPT, JOB, TOKEN, AttemptRecord, JobDirectory, LastWord


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobDirectory:
    """A job whose first attempt this process is a rank of."""
    directory = JobDirectory.of(tmp_path)
    directory.begin(AttemptRecord(attempt="7.0", began=time.time()))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ((JOB, str(directory.folder)), (ATTEMPT, "7.0"), (TOKEN, "t")):
        monkeypatch.setenv(name, value)
    return directory


def leave(main: Callable[[], int | None]) -> int:
    with pytest.raises(SystemExit) as left:
        exit_on_input_error(main)
    assert type(left.value.code) is int
    return left.value.code


def fail(error: Exception, **marks: bool) -> Callable[[], int]:
    for name, value in marks.items():
        setattr(error, name, value)

    def main() -> int:
        raise error

    return main


def word(job: JobDirectory) -> LastWord:
    found = job.last_word()
    assert found is not None
    assert [path.name for path in job.folder.iterdir() if path.name.isupper()] == [found.word]
    return found


@pytest.mark.parametrize(
    ("returned", "code", "expected", "step"),
    [
        (None, 0, ("DONE", "finished"), None),
        (0, 0, ("DONE", "finished"), None),
        (1, 1, ("DONE", "finished"), None),
        (
            Outcome(1, "finished at step 9; target WER NOT reached", step=9),
            1,
            ("DONE", "finished at step 9; target"),
            9,
        ),
        (Outcome(0, "stopped on request", step=4, word="RESUME"), 0, ("RESUME", "stopped on request"), 4),
    ],
)
def test_what_a_command_returns(
    job: JobDirectory, returned: int | None, code: int, expected: tuple[str, str], step: int | None
) -> None:
    assert leave(lambda: returned) == code
    said = word(job)
    assert (said.word, said.code, said.step) == (expected[0], code, step)
    assert said.reason.startswith(expected[1])


def test_a_mistake_in_the_input_is_not_tried_again(job: JobDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(fail(InputError(["a: is\nwrong", "b: too"]))) == 2
    assert (word(job).word, word(job).reason, word(job).code) == ("FAILED", "a: is wrong; b: too", 2)
    assert "error: 2 problems" in capsys.readouterr().err


def test_neither_is_a_run_that_cannot_go_on(job: JobDirectory) -> None:
    assert leave(fail(TrainingFailedError("the loss scale collapsed"))) == 1
    assert (word(job).word, word(job).reason) == ("FAILED", "the loss scale collapsed")


def test_what_may_pass_is(job: JobDirectory) -> None:
    assert leave(fail(TrainingFailedError("ranks of different jobs have met"), passing=True)) == 1
    assert job.last_word() is None


def test_what_nobody_foresaw_leaves_no_word(job: JobDirectory) -> None:
    with pytest.raises(ZeroDivisionError):
        exit_on_input_error(lambda: 1 // 0)
    assert leave(fail(RuntimeError("Connection closed by peer [127.0.0.1]"))) == 1
    assert job.last_word() is None


def test_rank_0_speaks_for_all(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert leave(lambda: Outcome(0, "finished")) == 0
    assert job.last_word() is None
    # But for what rank 1 alone knows of.
    assert leave(fail(InputError("clip_17: truncated"), local=True)) == 2
    assert word(job).word == "FAILED"


def test_an_attempt_that_was_replaced_says_nothing(job: JobDirectory) -> None:
    job.begin(AttemptRecord(attempt="7.1", began=time.time()))
    assert leave(lambda: 0) == 0
    assert job.last_word() is None


def test_a_job_that_cannot_be_told_is_a_line_and_hides_no_message(
    job: JobDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    job.owner.write_text("{")
    assert leave(fail(InputError("a: is wrong"))) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: a: is wrong"
    assert said[1].startswith("error: the job is not told of this failure: ")


_AGAIN = """
import sys
from trainer.exits import Outcome, exit_on_input_error
from trainer.memory.ladder import Rung, rungs_taken, start_again

def main():
    if not rungs_taken():
        start_again(Rung(name="smaller"))
    assert JOB.last_word() is None
    return Outcome(0, "finished below", step=2)

import os
from pathlib import Path
from trainer.job.directory import JobDirectory
JOB = JobDirectory(Path(os.environ["SIGNSCALE_JOB"]))
exit_on_input_error(main)
"""


def test_a_process_that_starts_itself_again_leaves_only_its_end(job: JobDirectory, tmp_path: Path) -> None:
    script = tmp_path / "again.py"
    script.write_text(_AGAIN)
    variables = {name: os.environ[name] for name in (JOB, ATTEMPT, TOKEN)}
    done = subprocess.run(
        [sys.executable, script], env=environment() | variables, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (word(job).word, word(job).reason, word(job).step) == ("DONE", "finished below", 2)
