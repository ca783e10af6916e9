"""What becomes of a job after an attempt: a pure function of the attempts so far and of what this one left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.job.directory import AttemptRecord, LastWord

ENDED_BY_SLURM = "left without a word (preempted, or its node failed)"
"""The reason recorded for an attempt that SLURM itself took back: nobody of it was left to record one."""

MOST_LOST = 10
"""Attempts without progress that SLURM may take back before the job itself is suspected."""

Action = Literal["done", "requeue", "resubmit", "stop", "fail"]


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What the check of the nodes found, as RUN/job/preflight-<attempt>.json says."""

    ok: bool
    bad_nodes: tuple[str, ...] = ()
    """Nodes that fail or are slow."""
    problems: tuple[str, ...] = ()
    """One line each, for people."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What is known when an attempt has ended."""

    earlier: Sequence[AttemptRecord]
    """The attempts before it since the job was launched (again), oldest first."""
    step_at_launch: int | None = None
    """Newest step that was saved before that; None: no step."""
    word: LastWord | None
    """Its last word; None: it left without one."""
    saved: int | None
    """Newest step that is saved now; None: no step, or the command takes none."""
    asked: str | None = None
    """Why somebody other than the cluster asked it to stop; None: nobody did."""
    preflight: Preflight | None = None
    """Of the check before it; None: there was none, or it was passed."""
    late: bool = False
    """Whether it was still at work when its time was all but over, and nobody waits for it any longer."""
    nodes: Sequence[str] = ()
    """Its nodes."""
    may_requeue: bool = True
    """Whether SLURM takes this job back into the queue."""
    limit: int = 3
    """Attempts in a row without a new step saved, after which the job is given up."""
    trouble: str = ""
    """The line of its output that tells most; empty: there is none."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do, and why."""

    action: Action
    reason: str
    """One line for people."""
    exclude: tuple[str, ...] = ()
    """Nodes that the next attempt stays away from."""


def decide(situation: Situation) -> Decision:
    """Decide by words, never by exit codes: none survives srun and a launcher."""
    word, preflight = situation.word, situation.preflight
    if word is not None and word.word == "DONE":
        return Decision(action="done", reason=word.reason)
    if word is not None and word.word == "FAILED":
        return Decision(action="fail", reason=word.reason)
    if situation.asked is not None:
        return Decision(action="stop", reason=f"stopped on request: {situation.asked}")
    if preflight is not None and not preflight.ok:
        reason = "the check of the nodes failed: " + ("; ".join(preflight.problems) or "it named no problem")
        if not preflight.bad_nodes:
            return Decision(action="fail", reason=reason)
        if len(situation.nodes) > 1 and set(situation.nodes) <= set(preflight.bad_nodes):
            # What all nodes share is to blame, and other nodes would share it too.
            return Decision(action="fail", reason=f"{reason} (on every node)")
        reason += f"; going on without {', '.join(preflight.bad_nodes)}"
    elif word is None and situation.late:
        reason = "did not save and leave in time before the time limit (see --signal_seconds)"
    else:
        reason = word.reason if word is not None else f"left without a word ({situation.trouble or 'its log is empty'})"
    idle = attempts_without_progress(situation.earlier, situation.saved, situation.step_at_launch)
    if idle >= situation.limit:
        step = "no step is saved" if not situation.saved else f"step {situation.saved} is still the last one saved"
        attempts = f"{idle} attempts in a row" if idle > 1 else "the attempt"
        return Decision(action="fail", reason=f"{attempts} made no progress ({step}); the last one: {reason}")
    bad = preflight.bad_nodes if preflight is not None else ()
    return Decision(action="requeue" if situation.may_requeue else "resubmit", reason=reason, exclude=bad)


def attempts_without_progress(earlier: Sequence[AttemptRecord], saved: int | None, begun_at: int | None = None) -> int:
    """Count the newest attempts in a row, this one included, that saved no step beyond `begun_at`.

    An attempt that SLURM itself took back counts neither way: the job is not to blame, at first (see `lost_too_often`).
    """
    return sum(1 for record in _idle(earlier, begun_at, saved) if record is None or record.reason != ENDED_BY_SLURM)


def lost_too_often(earlier: Sequence[AttemptRecord], begun_at: int | None = None) -> str | None:
    """Say why no further attempt begins; None: one does.

    A job that brings its nodes down leaves nobody who could decide: the attempt after it does, before it starts ranks.
    """
    lost = [record for record in _idle(earlier, begun_at) if record is not None and record.reason == ENDED_BY_SLURM]
    if len(lost) < MOST_LOST:
        return None
    nodes = ", ".join(dict.fromkeys(record.nodes or "?" for record in lost))
    return f"{len(lost)} attempts without progress {ENDED_BY_SLURM}, on {nodes}; does the job bring its nodes down?"


def _idle(earlier: Sequence[AttemptRecord], begun_at: int | None, *now: int | None) -> list[AttemptRecord | None]:
    """List the newest attempts in a row that saved no new step; None stands for this one, if what it saved is given."""
    best, idle = begun_at or 0, list[AttemptRecord | None]()
    for record, step in [*((record, record.step) for record in earlier), *((None, step) for step in now)]:
        idle.append(record)
        if (step or 0) > best:
            best, idle = step or 0, []
    return idle
