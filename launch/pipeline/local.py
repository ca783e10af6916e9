"""A pipeline on this machine: stage after stage, until one fails."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from launch import local
from launch.jobs.plan import Plan
from launch.pipeline.deciding import Decision
from launch.pipeline.definition import Definition
from launch.pipeline.planning import make_records
from launch.pipeline.record import begin
from launch.prepare import write
from trainer.job.directory import JobDirectory

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_locally(definition: Definition, decisions: Sequence[Decision], plans: Mapping[str, Plan]) -> int:
    """Run the stages that are not done, in order; return 0, or 1 after the first one that is not done."""
    records = make_records(definition, [decision.ready for decision in decisions])
    for number, decision in enumerate(decisions, 1):
        name = decision.ready.name
        head = f"stage {name} ({number} of {len(decisions)})"
        if not decision.run:
            print(f"\n{head}: {decision.why}", flush=True)
            continue
        print(f"\n{head}: {decision.why}", flush=True)
        plan = write(plans[name])
        records[name].save(plan.job)
        reason = begin(plan.job)
        if reason is None:
            with _signals_kept():
                code = local.run(plan)
            reason = _why_not_done(plan.job, code)
        if reason is not None:
            print(f"\n{head}: {reason}\nType the same command again to go on here.", file=sys.stderr)
            return 1
    print(f"\npipeline {definition.name}: all {len(decisions)} stages are done")
    return 0


def _why_not_done(job: JobDirectory, code: int) -> str | None:
    """Say why a stage is not done after an attempt; None where it is."""
    word = job.last_word()
    if word is None:
        return f"ended with exit code {code} and without a last word; its log is in {job.logs}"
    if word.word == "DONE":
        return None if word.code == 0 else f"is done, but not as well as was asked for: {word.reason}"
    return word.reason


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the handlers back that a stage replaces: between two stages Ctrl-C ends the pipeline."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
