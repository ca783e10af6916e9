"""Ending a job for good: asked to save first, made to leave only then."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.jobs.evidence import Evidence, read_evidence, read_submissions, read_tasks
from launch.jobs.judging import find_live
from launch.jobs.queue import Queue
from launch.jobs.traces import read_saved_step
from launch.slurm.asking import SlurmSilentError, on_cluster, run_tool
from launch.slurm.squeue import QueuedJob
from launch.slurm.states import is_waiting
from trainer.job.directory import AttemptRecord, JobDirectory
from trainer.job.processes import is_alive, is_here

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_WORDS = 20.0
_SECONDS_TO_DIE = 15.0
_SECONDS_TO_VANISH = 120.0
"""SLURM itself kills what does not leave within its KillWait (30 s by default)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cancellation."""

    code: int
    lines: tuple[str, ...]


def cancel(
    run: Path, *, task: int | None, at_once: bool, patience: float, reason: str, say: Callable[[str], None]
) -> Outcome:
    """End the run's job, or one task of it; wait at most `patience` seconds for it to save.

    Only jobs that the run recorded, and whose script is the run's own, are ever cancelled.
    """
    evidence = _read(run, task)
    targets = [e for e in evidence if _is_active(e)]
    elsewhere = [e for e in evidence if _works_elsewhere(e)]
    trouble = next((e.known.trouble for e in evidence if e.known.trouble and not _is_over(e)), None)
    if not targets and not elsewhere and not trouble:
        return Outcome(code=0, lines=(f"{run}: nothing to cancel: no job of it runs or waits",))
    if task is None:
        # Of an array, too: what has not begun finds it here.
        JobDirectory.of(run).cancel(reason)
    for e in evidence if trouble else [*targets, *elsewhere]:
        if task is not None or e.attempts:
            e.directory.cancel(reason)
    for e in elsewhere:
        assert e.newest is not None
        say(f"process {e.newest.pid} on {e.newest.host} is asked to save and leave; look there whether it has")
    if trouble:
        return Outcome(
            code=1,
            lines=(f"{trouble}; {run} is asked to save and leave, and a job of it that waits will leave as it begins",),
        )
    waiting = _Waiting(run, task, at_once=at_once, patience=patience, reason=reason, say=say)
    failures = waiting.wait() if targets else []
    for e in _read(run, task):
        _close(e, reason)
    return Outcome(code=1 if failures else 0, lines=tuple(failures))


def _read(run: Path, task: int | None) -> list[Evidence]:
    queue = Queue(read_submissions(JobDirectory.of(run)))
    whole = read_evidence(run, queue)
    tasks = read_tasks(whole, queue)
    return [tasks[task]] if task is not None else tasks or [whole]


def _is_over(e: Evidence) -> bool:
    """Tell whether a run's files alone say that its job is over."""
    return e.word is not None and e.word.word != "RESUME"


def _is_active(e: Evidence) -> bool:
    return find_live(e.known.jobs) is not None or _local_leader(e) is not None


def _local_leader(e: Evidence) -> AttemptRecord | None:
    """Return the attempt that a process of this machine leads, if it still lives."""
    newest = _open_attempt(e)
    return newest if newest is not None and newest.job_id is None and is_here(newest) and is_alive(newest) else None


def _works_elsewhere(e: Evidence) -> bool:
    newest = _open_attempt(e)
    return newest is not None and newest.job_id is None and not is_here(newest)


def _open_attempt(e: Evidence) -> AttemptRecord | None:
    newest = e.newest
    if newest is None or newest.ended is not None or (e.word is not None and e.word.attempt == newest.attempt):
        return None
    return newest


def _close(e: Evidence, reason: str) -> None:
    """Record the end of an attempt that is gone and could not do so itself: who begins another one asks this record."""
    newest = e.newest
    if newest is None or newest.ended is not None or _is_active(e) or _works_elsewhere(e) or e.known.trouble:
        return
    word = e.word.word if e.word is not None and e.word.attempt == newest.attempt else None
    e.directory.end(newest.attempt, step=read_saved_step(e.run), word=word, reason=reason)


class _Waiting:
    """The wait for jobs to leave, and what is done to those that do not."""

    def __init__(
        self,
        run: Path,
        task: int | None,
        *,
        at_once: bool,
        patience: float,
        reason: str,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._task, self._reason, self._say = run, task, reason, say
        self._began = time.monotonic()
        self._patience = 0.0 if at_once else patience
        self._at_once = at_once
        self._spoke = float("-inf")
        self._withdrawn: set[str] = set()
        self._ended: dict[str, float] = {}
        """Jobs told to end at once, and when."""
        self._signalled: dict[int, tuple[float, bool]] = {}
        """Processes told to end: when first, and whether killed."""
        self._failures: dict[str, str] = {}

    def wait(self) -> list[str]:
        """Wait until none is left; return what could not be ended."""
        while True:
            active = [e for e in _read(self._run, self._task) if _is_active(e)]
            if not active or self._has_given_up(active):
                return list(self._failures.values())
            for e in active:
                self._treat(e)
            self._report(active)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _treat(self, e: Evidence) -> None:
        job = find_live(e.known.jobs)
        if not e.directory.cancellation.exists() and (job is None or not is_waiting(job)):
            # A task that began after the others were asked.
            e.directory.cancel(self._reason)
        if job is None:
            leader = _local_leader(e)
            if leader is not None:
                self._signal(leader)
        elif is_waiting(job):
            # Only while it waits: one that has begun meanwhile is asked to save like any other.
            self._scancel(job, e, "--state=PENDING")
        elif self._is_impatient():
            self._scancel(job, e)

    def _is_impatient(self) -> bool:
        return time.monotonic() - self._began >= self._patience

    def _scancel(self, job: QueuedJob, e: Evidence, *options: str) -> None:
        if job.job_id in self._ended and not options:
            return
        cluster = next((line.get("cluster") for line in e.submissions if line["job_id"] == job.base), None)
        self._failures.pop(job.job_id, None)
        try:
            run_tool("scancel", *options, *on_cluster(cluster), job.job_id)
        except SlurmSilentError as error:
            self._failures[job.job_id] = f"job {job.job_id}: {error}"
            return
        if not options:
            self._ended[job.job_id] = time.monotonic()
            late = "" if self._at_once else f" (it did not leave within {self._patience:.0f} s)"
            self._say(f"job {job.job_id}: ended at once{late}")
        elif job.job_id not in self._withdrawn:
            self._withdrawn.add(job.job_id)
            self._say(f"job {job.job_id}: taken out of the queue")

    def _signal(self, leader: AttemptRecord) -> None:
        assert leader.pid is not None
        now = time.monotonic()
        first, killed = self._signalled.get(leader.pid, (None, False))
        if first is None:
            # The launcher saves and stops on the first signal, whichever it is.
            self._kill(leader.pid, signal.SIGTERM)
            self._signalled[leader.pid] = (now, False)
        elif self._is_impatient() and not killed:
            if now - max(first, self._began + self._patience) >= _SECONDS_TO_DIE:
                self._kill(leader.pid, signal.SIGKILL)
                self._signalled[leader.pid] = (first, True)
            else:
                # As by Ctrl-C: the second one ends the ranks at once.
                self._kill(leader.pid, signal.SIGINT)

    def _kill(self, pid: int, number: signal.Signals) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        except PermissionError:
            self._failures[str(pid)] = f"process {pid} is another user's; ask them, or its machine's administrator"

    def _has_given_up(self, active: Iterable[Evidence]) -> bool:
        """Tell whether what is left refuses to be ended."""
        now = time.monotonic()
        left = [job.job_id for e in active if (job := find_live(e.known.jobs)) is not None]
        stuck = [job_id for job_id in left if now - self._ended.get(job_id, now) > _SECONDS_TO_VANISH]
        for job_id in stuck:
            self._failures[job_id] = f"job {job_id}: still there {_SECONDS_TO_VANISH:.0f} s after scancel"
        return bool(self._failures) and (bool(stuck) or self._is_impatient())

    def _report(self, active: Iterable[Evidence]) -> None:
        now = time.monotonic()
        if now - self._spoke < _SECONDS_BETWEEN_WORDS or self._is_impatient():
            return
        self._spoke = now
        spent = f"{now - self._began:.0f} of at most {self._patience:.0f} s"
        for e in active:
            job = find_live(e.known.jobs)
            if job is not None and is_waiting(job):
                continue
            who = f"job {job.job_id} on {job.nodes}" if job is not None else f"process {e.newest.pid}"  # type: ignore[union-attr]
            self._say(f"{who}: asked to save and leave ({spent})")
