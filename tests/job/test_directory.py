"""RUN/job: only the owner's word counts, and what an attempt left is not taken for the next one's."""

from pathlib import Path

import pytest

from trainer.errors import InputError
from trainer.job.directory import AttemptRecord, JobDirectory


def test_the_next_attempt_starts_without_the_words_of_the_last(tmp_path: Path) -> None:
    job = JobDirectory.of(tmp_path)
    job.begin(AttemptRecord(attempt="7.0", began=1.0, job_id="7"))
    job.request_stop("asked by a test")
    job.leave_word("RESUME", attempt="7.0", step=3, reason="stopped on request")
    job.end("7.0", step=3, word="RESUME", reason="stopped on request")
    job.begin(AttemptRecord(attempt="7.1", began=2.0, job_id="7"))
    assert job.last_word() is None
    assert not job.stop.exists()
    first, second = job.history()
    assert (first.word, first.step, second.ended) == ("RESUME", 3, None)


def test_an_attempt_that_lost_the_run_leaves_no_word(tmp_path: Path) -> None:
    job = JobDirectory.of(tmp_path)
    job.begin(AttemptRecord(attempt="7.0", began=1.0))
    job.begin(AttemptRecord(attempt="7.1", began=2.0))
    job.leave_word("DONE", attempt="7.0", step=9, reason="finished")
    assert job.last_word() is None
    job.leave_word("FAILED", attempt="7.1", step=None, reason="no corpus")
    word = job.last_word()
    assert word is not None
    assert (word.word, word.reason) == ("FAILED", "no corpus")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    job = JobDirectory.of(tmp_path)
    job.begin(AttemptRecord(attempt="7.0", began=1.0))
    with job.attempts.open("a") as file:
        file.write("{half\n")
    with pytest.raises(InputError, match=r"attempts.jsonl:2"):
        job.history()


def test_a_job_cancelled_while_it_waited_is_stopped_as_it_begins(tmp_path: Path) -> None:
    job = JobDirectory.of(tmp_path)
    job.add_submission("7")
    job.cancel("cancelled by a test")
    job.begin(AttemptRecord(attempt="7.0", began=1.0))
    assert job.stop.read_text() == "cancelled by a test\n"
    job.begin(AttemptRecord(attempt="7.1", began=2.0))
    cancelled = job.cancelled()
    assert cancelled is not None
    assert cancelled.reason == "cancelled by a test"


def test_launching_again_takes_a_cancellation_back(tmp_path: Path) -> None:
    job = JobDirectory.of(tmp_path)
    job.withdraw_cancellation()
    job.cancel("cancelled by a test")
    job.withdraw_cancellation()
    assert job.cancelled() is None
    assert not job.stop.exists()
