"""Lead one attempt of a batch job, from the batch script; decide what becomes of the job when it has ended.

    python -m launch.slurm.director --job RUN/job [--preflight COMMAND …] -- srun … python -m launch.slurm.agent …

It takes the place of the batch script's shell, so SLURM's advance warning reaches it. What it is told it passes on
as a request (RUN/job/STOP), since a signal to srun would end the ranks at once; what it decides, it decides by the
words in RUN/job. The command after --preflight checks the nodes first and leaves RUN/job/preflight-<attempt>.json:
{"ok": bool, "bad_nodes": ["node2"], "problems": ["…"]}.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.jobs.plan import unique_name
from launch.pipeline.record import begin
from launch.slurm import control
from launch.slurm.attempt import Leading, close_predecessors, find
from launch.slurm.control import ControlError, SilentError
from launch.slurm.decision import Decision, Preflight, Situation, decide, lost_too_often
from launch.slurm.limit import LIMIT, Alarm, LimitWatch, OutOfTimeError, find_end_time
from launch.slurm.needs import redirect_children
from launch.slurm.relay import ExitNoise, notice_of_cancellation, relay, telling_line
from launch.slurm.requests import StopRequests, await_termination, forget_terminations, say
from launch.slurm.submit import submit
from launch.sweep.table import RECORD, publish
from trainer.errors import InputError
from trainer.exits import exit_on_input_error
from trainer.job.directory import AttemptRecord

_SECONDS_FOR_PREFLIGHT = 900.0
_SECONDS_UNTIL_ENDED = 600.0
"""How long a requeued script waits for SLURM to end it."""


def main(argv: Sequence[str]) -> int:
    """Lead the attempt; 0: the job is done, 1: it is not (a requeued script is ended by SLURM instead)."""
    options, preflight, command = _parse(argv)
    leading = find(options.job)
    requests = StopRequests(leading.job, leading.attempt)
    if (over := close_predecessors(leading)) is not None:
        say(f"{over.attempt} left {over.word} ({over.reason}); nothing is left to do")
        return over.code if over.word == "DONE" else 1
    leading.job.begin(
        AttemptRecord(
            attempt=leading.attempt,
            began=time.time(),
            job_id=leading.job_id,
            nodes=leading.nodes,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
    )
    if (lacking := begin(leading.job)) is not None:
        return _refuse(leading, lacking)
    if (lost := lost_too_often(leading.earlier(), leading.step_at_launch())) is not None:
        return _refuse(leading, lost)
    requests.open()
    say(f"attempt {leading.attempt} on {leading.nodes}; its output: {leading.log}")
    found, late = None, False
    if leading.cancelled() is None:
        end_time = find_end_time(leading.job_id)
        os.environ[LIMIT] = "" if end_time is None else str(end_time)
        try:
            with Alarm(end_time) as alarm, LimitWatch(leading.job_id, end_time, _pass_on(leading, alarm)):
                found = _check_nodes(preflight, leading, options.job) if preflight else None
                if found is None or found.ok:
                    _run(command, leading)
        except OutOfTimeError:
            late = True
            say("the time limit is near and the ranks are still at work; not waiting for them any longer")
    requests.close()
    code = _conclude(leading, found, late=late)
    if leading.task is not None and (leading.plan.run / RECORD).exists():
        _show_sweep(leading.plan.run)
    return code


def _pass_on(leading: Leading, alarm: Alarm) -> Callable[[float | None], None]:
    """Return what follows where somebody moves the time limit: the alarm is set anew, and the ranks find a file."""

    def move(end_time: float | None) -> None:
        alarm.move(end_time)
        now = "there is no time limit" if end_time is None else f"the time limit is in {end_time - time.time():.0f} s"
        say(f"{now}, by what SLURM says now; telling the ranks")
        try:
            leading.job.move_end(leading.attempt, end_time)
        except OSError as error:
            say(f"the ranks cannot be told ({error})")

    return move


def _show_sweep(out: Path) -> None:
    """Keep the sweep's table, and print it after the last run; what goes wrong here is no failure of this run."""
    try:
        table = publish(out)
    except (InputError, OSError) as error:
        return say(f"no table of the sweep: {error}")
    return say(f"all runs of this sweep have ended\n{table}") if table is not None else None


def _refuse(leading: Leading, lacking: str) -> int:
    """End a job before any rank starts.

    Among others a pipeline's stage whose turn it is not: SLURM's dependencies know exit codes, not what was done.
    """
    leading.job.leave_word("FAILED", attempt=leading.attempt, step=leading.saved_step(), reason=lacking, code=1)
    leading.job.end(leading.attempt, step=leading.saved_step(), word="FAILED", reason=lacking)
    say(lacking)
    return 1


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.director", description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="RUN/job")
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own, command = words[:cut], words[cut + 1 :]
    at = own.index("--preflight") if "--preflight" in own else len(own)
    options = parser.parse_args(own[:at])
    if not command:
        parser.error("expected -- and the command that starts the ranks")
    return options, own[at + 1 :], command


def _run(command: Sequence[str], leading: Leading) -> None:
    """Run the command to its end, its output into the attempt's log and on. An `alarm` leaves it running."""
    leading.job.logs.mkdir(parents=True, exist_ok=True)
    noise = ExitNoise(lambda: (word := leading.word()) is not None and word.word == "DONE")
    # No context manager: that would wait for the end of what the alarm no longer waits for.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    relay(process.stdout, leading.log, sys.stdout.buffer, noise)
    process.wait()
    if noise.lines:
        say(f"left out {noise.lines} lines in which a launcher complains that another node was done before it")


def _check_nodes(command: Sequence[str], leading: Leading, folder: Path) -> Preflight | None:
    """Run the check of the nodes; None: it left no result, which says no more than an attempt without a word."""
    result = folder / f"preflight-{leading.attempt}.json"
    say("checking the nodes")
    _run(["timeout", "--kill-after=30", str(_SECONDS_FOR_PREFLIGHT), *command], leading)
    try:
        content = json.loads(result.read_text(encoding="utf-8"))
        return Preflight(
            ok=bool(content["ok"]), bad_nodes=tuple(content["bad_nodes"]), problems=tuple(content["problems"])
        )
    except FileNotFoundError:
        say(f"the check of the nodes left no {result.name}; starting all the same")
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{result}: is no result of a check of nodes ({error!r})") from error


def _conclude(leading: Leading, found: Preflight | None, *, late: bool) -> int:
    """Decide, record the end, and put the job back into the queue where it is to go on."""
    job, attempt = leading.job, leading.attempt
    state: dict[str, str] | None = None
    trouble = ""
    if (word := leading.word()) is None or word.word != "DONE":
        try:
            state = control.show(leading.job_id)
        except (ControlError, SilentError) as error:
            trouble = str(error)
    # Asked for only now: a node that was cut off hears of SLURM again when its job has long been elsewhere.
    if (owner := job.owner_attempt()) != attempt:
        say(f"attempt {owner} has taken over; leaving everything to it")
        return 1
    if state is not None and int(state["Restarts"]) != leading.restarts:
        say("SLURM has put the job back into the queue by itself")
        return 1
    saved = leading.saved_step()
    decision = decide(
        Situation(
            earlier=leading.earlier(),
            step_at_launch=leading.step_at_launch(),
            word=word,
            saved=saved,
            asked=_asked_to_end(leading, state or {}),
            preflight=found,
            late=late,
            nodes=control.node_names(leading.nodes) if found is not None and not found.ok else (),
            may_requeue=state is None or state["Requeue"] == "1",
            limit=leading.plan.max_attempts_without_progress,
            trouble=telling_line(leading.log),
        )
    )
    said = word.word if word is not None else None
    if decision.action == "fail" and said != "FAILED":
        said = "FAILED"
        job.leave_word(said, attempt=attempt, step=saved, reason=decision.reason, code=1)
    job.end(attempt, step=saved, word=said, reason=decision.reason)
    say(f"{decision.action}: {decision.reason}" + ("" if saved is None else f" (step {saved} is saved)"))
    if state is None and decision.action in ("requeue", "resubmit"):
        say(f"SLURM does not say how this job stands ({trouble}); launch it again if SLURM does not start it by itself")
    elif decision.action == "requeue":
        _requeue(leading, decision, state or {})
    elif decision.action == "resubmit":
        _resubmit(leading, decision, state or {}, "")
    return word.code if decision.action == "done" and word is not None else 1


def _asked_to_end(leading: Leading, state: dict[str, str]) -> str | None:
    if (cancelled := leading.cancelled()) is not None:
        return cancelled.reason
    # SLURM would requeue even a job that was cancelled; and while it ends it, it does not say why.
    ending = state.get("JobState") == "COMPLETING" and notice_of_cancellation(leading.log) == ""
    return "scancel" if ending or state.get("JobState") == "CANCELLED" else None


def _requeue(leading: Leading, decision: Decision, state: Mapping[str, str]) -> None:
    forget_terminations()
    try:
        control.requeue(leading.job_id)
    except ControlError as error:
        return _resubmit(leading, decision, state, f"the requeue was refused: {error}; ")
    except SilentError as error:
        return say(f"SLURM does not answer ({error}); launch the job again if SLURM does not start it by itself")
    if decision.exclude:
        try:
            control.exclude(leading.job_id, decision.exclude)
        except (ControlError, SilentError) as error:
            say(f"SLURM does not exclude {', '.join(decision.exclude)}: {error}")
    # A script that ended now, before SLURM ends it, would make the job COMPLETED or FAILED for good.
    if not await_termination(_SECONDS_UNTIL_ENDED):
        say("SLURM took the requeue, but did not end this script")
    return None


def _resubmit(leading: Leading, decision: Decision, state: Mapping[str, str], refusal: str) -> None:
    """Submit the job's script anew, to start when this job has ended. Leaves FAILED where SLURM refuses that too."""
    # A singleton waits for all jobs of its name: of an array the other tasks, of a name that was given any job.
    alone = leading.task is None and leading.plan.name == unique_name(leading.plan.run)
    after = "singleton" if alone else f"afterany:{leading.job_id}"
    array = None if leading.task is None else str(leading.task)
    try:
        job_id = submit(
            leading.plan.job.script,
            job=leading.plan.job,
            dependencies=[after],
            array=array,
            # Of several, the one that this job waits for and is excluded from nodes of: jobs do not see another's.
            cluster=os.environ.get("SLURM_CLUSTER_NAME") if (leading.plan.slurm or {}).get("clusters") else None,
            # In place of the script's own line, and with what earlier checks of the nodes found.
            exclude=control.with_excluded(state, decision.exclude),
        )
    except InputError as error:
        reason = f"SLURM takes the job neither back nor anew: {refusal}{'; '.join(error.problems)}"
        leading.job.leave_word("FAILED", attempt=leading.attempt, step=leading.saved_step(), reason=reason, code=1)
        return say(reason)
    say(f"{refusal}submitted anew as {job_id}")
    for line in redirect_children(leading.job):
        say(line)
    return None


if __name__ == "__main__":
    exit_on_input_error(lambda: main(sys.argv[1:]))
