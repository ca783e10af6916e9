"""What a run's state is, why, and what to type next: decided from the evidence alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.jobs.again import command_again
from launch.jobs.evidence import Evidence
from launch.jobs.words import say_ago, say_duration, say_time
from launch.slurm.asking import on_cluster
from launch.slurm.squeue import QueuedJob
from launch.slurm.states import explain_end, explain_wait, has_ended, is_held, is_waiting
from trainer.job.directory import AttemptRecord
from trainer.job.processes import is_alive, is_here

State = Literal[
    "PREPARING",
    "PREPARED",
    "QUEUED",
    "HELD",
    "RUNNING",
    "STOPPING",
    "REQUEUED",
    "STOPPED",
    "CANCELLED",
    "DONE",
    "FAILED",
    "LOST",
    "UNKNOWN",
    "NOT LAUNCHED",
]
ACTIVE: frozenset[State] = frozenset({"QUEUED", "HELD", "RUNNING", "STOPPING", "REQUEUED"})
"""States in which a job holds or waits for machines."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The state of a run."""

    state: State
    why: str
    """One line."""
    next: tuple[str, ...] = ()
    """Commands to type, the likeliest first; each with a remark after #."""
    job: QueuedJob | None = None
    """The job that holds or waits for machines."""


def judge(evidence: Evidence, blame: Callable[[QueuedJob], str | None] = lambda job: None) -> Verdict:
    """Decide; `blame` names the jobs that a waiting one waits for, or that failed before it."""
    live = find_live(evidence.known.jobs)
    if live is not None:
        return _judge_live(evidence, live, blame)
    if evidence.word is not None and evidence.word.word != "RESUME":
        return _judge_word(evidence)
    newest = evidence.newest
    if newest is not None and newest.ended is None and evidence.word is None and newest.job_id is None:
        return _judge_local(evidence, newest)
    if evidence.known.trouble and evidence.submissions:
        return _judge_blindly(evidence)
    if evidence.word is not None:
        return _judge_word(evidence)
    if newest is not None:
        return _judge_silent(evidence, newest)
    if evidence.submissions:
        return _judge_never_begun(evidence, blame)
    if evidence.plan is not None:
        return Verdict(state="PREPARED", why="written, not started yet", next=_again(evidence))
    return Verdict(state="PREPARING", why="its launch is writing it now, or was broken off (no plan.json)")


def find_live(jobs: Sequence[QueuedJob]) -> QueuedJob | None:
    """Return the job that counts: one with nodes before one that waits, the newest of several."""
    live = [job for job in reversed(jobs) if not has_ended(job)]
    return max(live, key=lambda job: not is_waiting(job), default=None)


def _judge_live(e: Evidence, job: QueuedJob, blame: Callable[[QueuedJob], str | None]) -> Verdict:
    if not is_waiting(job):
        where = f"job {job.job_id} on {job.nodes or 'its nodes'}"
        spent = f", {_spent(job)}" if job.elapsed is not None else ""
        if job.state == "RUNNING" and (e.stop_asked or e.cancelled):
            return Verdict(state="STOPPING", why=f"{where}: asked to save and leave{spent}", next=_watch(e), job=job)
        slurm = "" if job.state == "RUNNING" else f", {job.state} in SLURM's words"
        return Verdict(state="RUNNING", why=f"{where}{spent}{slurm}", next=_watch(e), job=job)
    wait = explain_wait(job)
    other = "; ".join(e.lacking) or blame(job)
    wait = f"{wait}: {other}" if other else wait
    start = ""
    if job.start is not None and job.start > e.now:
        start = f"; starts about {say_time(job.start, e.now)} (in {say_duration(job.start - e.now)}), as SLURM sees it"
    if is_held(job):
        cluster = next((line.get("cluster") for line in e.submissions if line["job_id"] == job.base), None)
        release = f"{shlex.join(['scontrol', *on_cluster(cluster), 'release', job.job_id])}  # let it go on"
        return Verdict(state="HELD", why=f"job {job.job_id}: {wait}", next=(release, *_cancel(e)), job=job)
    if e.attempts:
        left = f"; attempt {e.attempts[-1].attempt} {_say_end(e.attempts[-1])}"
        return Verdict(state="REQUEUED", why=f"job {job.job_id}: {wait}{start}{left}", next=_watch(e), job=job)
    return Verdict(state="QUEUED", why=f"job {job.job_id}: {wait}{start}", next=_watch(e), job=job)


def _judge_word(e: Evidence) -> Verdict:
    assert e.word is not None
    said = e.word
    when = say_ago(said.time, e.now)
    step = f" at step {said.step}" if said.step is not None else ""
    if said.word == "DONE":
        verdict = "finished, but not as well as was asked for" if said.code else "finished"
        return Verdict(state="DONE", why=f"{verdict}{step} {when}: {said.reason}", next=_after_done(e))
    if said.word == "FAILED":
        return Verdict(state="FAILED", why=f"{said.reason} ({when}{step})", next=(*_log(e), *_again(e)))
    if e.cancelled:
        why = f"{e.cancelled.reason} {say_ago(e.cancelled.time, e.now)}; saved{step}"
        return Verdict(state="CANCELLED", why=why, next=_again(e))
    return Verdict(state="STOPPED", why=f"saved and left{step} {when}: {said.reason}", next=_again(e))


def _judge_local(e: Evidence, newest: AttemptRecord) -> Verdict:
    place = f"process {newest.pid} on {newest.host}"
    since = f"for {say_duration(e.now - newest.began)}"
    if not is_here(newest):
        return Verdict(
            state="UNKNOWN",
            why=f"{place} has not said that it ended; ask there whether it still runs",
            next=_watch(e),
        )
    if is_alive(newest):
        asked = e.stop_asked or e.cancelled
        why = f"{place}: asked to save and leave" if asked else f"{place}, {since}"
        return Verdict(state="STOPPING" if asked else "RUNNING", why=why, next=_watch(e))
    if e.cancelled:
        return Verdict(state="CANCELLED", why=f"{e.cancelled.reason}; {place} is gone", next=_again(e))
    return Verdict(
        state="LOST",
        why=f"{place} is gone without a last word (killed, or out of memory?)",
        next=(*_log(e), *_again(e)),
    )


def _judge_blindly(e: Evidence) -> Verdict:
    files = "its files tell of no attempt yet"
    if e.word is not None:
        files = f"its last attempt saved and left {say_ago(e.word.time, e.now)}; it may be queued again"
    elif e.newest is not None and e.newest.ended is not None:
        files = f"attempt {e.newest.attempt} {_say_end(e.newest)}; it may be queued again"
    elif e.newest is not None:
        place = f" on {e.newest.nodes}" if e.newest.nodes else ""
        files = f"attempt {e.newest.attempt} began {say_ago(e.newest.began, e.now)}{place} and has not ended"
    numbers = ", ".join(dict.fromkeys(line["job_id"] for line in e.submissions[-3:]))
    return Verdict(state="UNKNOWN", why=f"{e.known.trouble} (job {numbers}); {files}", next=_watch(e))


def _judge_silent(e: Evidence, newest: AttemptRecord) -> Verdict:
    """Judge a job that SLURM no longer runs and whose last attempt left no word."""
    last = _last_job(e)
    if newest.ended is not None:
        how = f"attempt {newest.attempt} {_say_end(newest)}"
    else:
        how = f"attempt {newest.attempt} left no last word"
    if last is not None:
        how += f"; {explain_end(last)} ({last.state}, job {last.job_id})"
    elif newest.job_id is not None:
        how += f"; SLURM no longer knows job {newest.job_id}"
    if e.cancelled:
        return Verdict(state="CANCELLED", why=f"{e.cancelled.reason}; {how}", next=_again(e))
    return Verdict(state="LOST", why=how, next=(*_log(e), *_again(e)))


def _judge_never_begun(e: Evidence, blame: Callable[[QueuedJob], str | None]) -> Verdict:
    last = _last_job(e)
    number = e.submissions[-1]["job_id"]
    if e.cancelled:
        return Verdict(state="CANCELLED", why=f"{e.cancelled.reason} before it began", next=_again(e))
    if e.lacking:
        # SLURM cancelled it, and forgets that in minutes.
        return Verdict(state="CANCELLED", why=f"job {number} never began: {'; '.join(e.lacking)}", next=_again(e))
    if last is None:
        why = f"job {number} is no longer in the queue and never began"
        return Verdict(state="LOST", why=why, next=_again(e))
    other = blame(last)
    why = f"job {last.job_id}: {explain_end(last)}{f' ({other})' if other else ''}; it never began"
    return Verdict(state="CANCELLED" if last.state == "CANCELLED" else "LOST", why=why, next=_again(e))


def _last_job(e: Evidence) -> QueuedJob | None:
    return e.known.jobs[-1] if e.known.jobs else None


def _say_end(record: AttemptRecord) -> str:
    words = {"RESUME": "saved and left", "DONE": "finished", "FAILED": "failed", None: "left without a word"}
    said = words[record.word] if record.ended is not None else "left no word"
    return f"{said}: {record.reason}" if record.reason else said


def _spent(job: QueuedJob) -> str:
    spent = say_duration(job.elapsed or 0.0)
    return f"{spent} of {say_duration(job.limit)}" if job.limit else f"{spent}, no time limit"


def name_run(e: Evidence) -> str:
    """Quote the run for a shell."""
    return shlex.quote(str(e.run))


def _watch(e: Evidence) -> tuple[str, ...]:
    plan = e.plan or {}
    if plan.get("tasks") and plan.get("run") == str(e.run.absolute()):
        # Each task of an array has a log, the whole has none.
        return _cancel(e)
    return (f"signscale logs -f {name_run(e)}  # watch it", *_cancel(e))


def _cancel(e: Evidence) -> tuple[str, ...]:
    return (f"signscale cancel {name_run(e)}  # save and end it",)


def _log(e: Evidence) -> tuple[str, ...]:
    return (f"signscale logs {name_run(e)}  # all it said",) if e.attempts else ()


def _after_done(e: Evidence) -> tuple[str, ...]:
    command = (e.plan or {}).get("command") or []
    if command[:1] == ["train"]:
        return (f"signscale evaluate --checkpoint {name_run(e)} --split test  # its word error rate",)
    return ()


def _again(e: Evidence) -> tuple[str, ...]:
    command = command_again(e.plan or {}, e.directory)
    remark = "go on from the newest checkpoint" if e.attempts else "start it"
    return () if command is None else (f"{command}  # {remark}",)
