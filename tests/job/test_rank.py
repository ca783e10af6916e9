"""A rank's part in its job: whether it may publish, whether to stop, and who may work on a run at all."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment
from trainer.errors import InputError, TrainingFailedError
from trainer.job.directory import ATTEMPT, END_TIME, JOB, TOKEN, AttemptRecord, JobDirectory
from trainer.job.lock import RunLock
from trainer.job.rank import Job, NoJob, find_job
from trainer.job.watch import TimeWatch
from trainer.signals import StopRequest


def begin(run: Path, attempt: str, **facts: object) -> Job:
    """Begin an attempt at a run; return one of its ranks' view."""
    directory = JobDirectory.of(run)
    directory.begin(AttemptRecord(attempt=attempt, began=time.time(), **facts))  # type: ignore[arg-type]
    found = find_job({JOB: str(directory.folder), ATTEMPT: attempt, TOKEN: "t"})
    assert isinstance(found, Job)
    return found


# What the environment says.


def test_a_process_without_a_job_has_none() -> None:
    job = find_job({"RANK": "0"})
    assert isinstance(job, NoJob)
    job.check()
    assert job.stop_reason() is None


def test_a_job_named_in_part_is_refused_with_all_that_is_missing() -> None:
    with pytest.raises(InputError) as refused:
        find_job({JOB: "/run/job", END_TIME: "soon"})
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [ATTEMPT, TOKEN, END_TIME]


# The fence.


def test_only_the_newest_attempt_may_publish(tmp_path: Path) -> None:
    old = begin(tmp_path, "7.0")
    old.check()
    new = begin(tmp_path, "7.1")
    new.check()
    with pytest.raises(TrainingFailedError, match=r"another attempt \(7.1\) has taken over .*\(7.0\); nothing was pub"):
        old.check()
    with pytest.raises(TrainingFailedError, match="taken over"):
        old.stop_reason()
    old.leave_word("DONE", step=3, reason="finished", code=0)
    assert new.directory.last_word() is None


def test_a_rank_whose_job_folder_is_gone_publishes_nothing(tmp_path: Path) -> None:
    job = begin(tmp_path, "7.0")
    shutil.rmtree(job.directory.folder)
    with pytest.raises(TrainingFailedError, match="nothing names the owner"):
        job.check()


# Requests to stop.


def test_a_stop_file_is_a_request_with_its_reason(tmp_path: Path) -> None:
    job = begin(tmp_path, "7.0")
    request = StopRequest(job)
    job.directory.request_stop("signscale cancel\nby somebody")
    assert request.requested
    assert request.reason == "on request (signscale cancel by somebody)"
    job.directory.stop.unlink()
    assert request.requested, "a request stands"


def test_only_the_leading_rank_looks_for_it(tmp_path: Path) -> None:
    job = begin(tmp_path, "7.0")
    job.directory.request_stop("now")
    assert not StopRequest(job, leads=False).requested


def test_the_files_are_looked_at_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = begin(tmp_path, "7.0")
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    assert job.stop_reason() is None
    job.directory.request_stop("now")
    clock = 100.9
    assert job.stop_reason() is None
    clock = 101.0
    assert job.stop_reason() == "now"


@pytest.fixture
def listening() -> Iterator[StopRequest]:
    request = StopRequest()
    request.install()
    yield request
    request.uninstall()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_request(listening: StopRequest, number: signal.Signals) -> None:
    assert not listening.requested
    os.kill(os.getpid(), number)
    assert listening.requested
    assert listening.reason == f"on request ({number.name})"


def test_sigterm_may_come_as_often_as_it_likes_and_ctrl_c_twice_ends_at_once(listening: StopRequest) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_process_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        request.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request.requested
        request.uninstall()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_go_back_to_whoever_had_them() -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    request = StopRequest()
    request.install()
    request.uninstall()
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before


# The time limit.


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_save_begins_while_two_steps_the_last_save_and_a_minute_fit() -> None:
    clock = Clock()
    watch = TimeWatch(1000.0 + 7200, clock)
    for seconds in (5.0, 30.0, 8.0):
        watch.note_step(seconds)
    watch.note_save(40.0)
    clock.now = 1000.0 + 7200 - (2 * 30 + 40 + 60)
    assert watch.reason() is None
    clock.now += 1
    assert watch.reason() == ("before the time limit: 159 s are left, two steps, a save and a margin take 160 s")
    # Slow steps of long ago do not count for ever.
    for _ in range(20):
        watch.note_step(1.0)
    assert watch.reason() is None


def test_a_short_job_keeps_nine_tenths_of_its_time() -> None:
    clock = Clock()
    watch = TimeWatch(1060.0, clock)
    assert watch.reason() is None
    clock.now = 1053.0
    assert watch.reason() is None
    clock.now = 1055.0
    assert watch.reason() is not None


def test_a_limit_that_is_moved_is_the_one_that_counts() -> None:
    clock = Clock()
    watch = TimeWatch(1060.0, clock)
    clock.now = 1055.0
    watch.move(1000.0 + 7200)
    assert watch.reason() is None
    # The margin is that of a long job now.
    clock.now = 1000.0 + 7200 - 59
    assert "a margin take 60 s" in str(watch.reason())
    watch.move(None)
    assert watch.reason() is None
    watch.move(1000.0)
    assert watch.reason() is not None


def test_a_rank_hears_of_a_limit_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    request = StopRequest(begin(tmp_path, "7.1"))
    directory = JobDirectory.of(tmp_path)
    assert not request.requested
    directory.move_end("7.0", time.time())
    clock += 1
    assert not request.requested, "that was another attempt's"
    directory.move_end("7.1", time.time() + 7200)
    clock += 1
    assert not request.requested
    directory.move_end("7.1", time.time())
    clock += 1
    assert request.requested
    assert request.reason.startswith("before the time limit")


def test_without_a_limit_there_is_no_hurry() -> None:
    watch = TimeWatch(None)
    watch.note_step(1e9)
    assert watch.reason() is None


# Plain commands beside a launched job.


def plain(run: Path) -> None:
    find_job({}).check_run(run)


def test_a_run_that_was_never_launched_is_free(tmp_path: Path) -> None:
    plain(tmp_path / "not there")


def test_a_run_that_a_job_works_on_is_not(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    job = begin(run, "7.0", job_id="7", nodes="node[1-2]", host="node1", pid=os.getpid())
    with pytest.raises(InputError) as refused:
        plain(run)
    said = str(refused.value)
    assert "attempt 7.0 of its job has begun on node[1-2] and not ended" in said
    assert f"signscale status '{run}'" in said
    assert f"signscale cancel '{run}'" in said
    job.directory.end("7.0", step=3, word="RESUME", reason="stopped")
    plain(run)


def test_an_attempt_that_said_its_last_word_has_ended(tmp_path: Path) -> None:
    begin(tmp_path, "7.0").leave_word("DONE", step=3, reason="finished", code=0)
    plain(tmp_path)


def test_a_local_attempt_ends_with_its_process_and_no_other_does(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = platform.node()
    begin(tmp_path / "a", f"local-1-{process.pid}", host=here, pid=process.pid)
    begin(tmp_path / "b", f"local-1-{process.pid}", host="another-machine", pid=process.pid)
    begin(tmp_path / "c", "7.0", host=here, pid=process.pid)
    with pytest.raises(InputError, match=rf"local-1-{process.pid}"):
        plain(tmp_path / "a")
    # One that got its number after a restart of the machine is another process.
    JobDirectory.of(tmp_path / "d").begin(
        AttemptRecord(attempt="local-1", began=time.time() - 3600, host=here, pid=process.pid)
    )
    plain(tmp_path / "d")
    process.communicate(b"\n")
    plain(tmp_path / "a")
    for run in ("b", "c"):
        with pytest.raises(InputError, match="not ended"):
            plain(tmp_path / run)


# The lock.

_HOLDER = """
import sys
from pathlib import Path
from trainer.job.lock import RunLock
RunLock(Path(sys.argv[1]), attempt=sys.argv[2], say=print).acquire()
print("held", flush=True)
input()
"""


def hold(run: Path, attempt: str = "") -> subprocess.Popen[bytes]:
    """Start a process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(run), attempt],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_command_is_told_who_works_on_the_run_and_a_dead_one_leaves_it_free(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    lock = RunLock(tmp_path, attempt="", say=print)
    try:
        with pytest.raises(InputError, match=rf"process {holder.pid} on {platform.node()} works on this run"):
            lock.acquire()
        with pytest.raises(InputError, match="works on this run"):
            RunLock(tmp_path, attempt="7.0", say=print).acquire()
    finally:
        holder.kill()
        holder.wait()
    lock.acquire()
    lock.close()


def test_an_attempt_is_not_kept_out_by_one_that_was_cut_off(tmp_path: Path) -> None:
    holder = hold(tmp_path, "7.0")
    said: list[str] = []
    try:
        RunLock(tmp_path, attempt="7.1", say=said.append).acquire()
        with pytest.raises(InputError, match="works on this run"):
            RunLock(tmp_path, attempt="", say=print).acquire()
    finally:
        holder.kill()
        holder.wait()
    assert said == [f"{tmp_path / '.lock'}: attempt 7.0 has not let go of it; this one owns the run now"]
