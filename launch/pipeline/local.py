"""A pipeline on this machine: stage after stage, until one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from launch.pipeline.deciding import Decision
from launch.pipeline.definition import Definition
from launch.pipeline.record import StageRecord, begin
from launch.pipeline.resolving import Ready
from trainer.job.directory import AttemptRecord


def run_locally(definition: Definition, decisions: Sequence[Decision]) -> int:
    """Run the stages that are not done, in order; return 0, or 1 after the first one that failed."""
    records = make_records(definition, [decision.ready for decision in decisions])
    for number, decision in enumerate(decisions, 1):
        ready = decision.ready
        head = f"stage {ready.name} ({number} of {len(decisions)})"
        if not decision.run:
            print(f"{head}: done already", flush=True)
            continue
        print(f"{head}: {decision.why}", flush=True)
        records[ready.name].save(ready.job)
        lacking = begin(ready.job)
        reason = lacking or _run(ready)
        if reason is not None:
            print(f"{head}: {reason}\nMend that and type the same command again: it goes on here.", file=sys.stderr)
            return 1
    print(f"pipeline {definition.name}: all {len(decisions)} stages are done")
    return 0


def make_records(definition: Definition, stages: Sequence[Ready]) -> Mapping[str, StageRecord]:
    """Make what each stage's job folder tells of it."""
    folders = {ready.name: str(ready.job.folder.absolute()) for ready in stages}
    return {
        ready.name: StageRecord(
            pipeline=str(definition.file.absolute()),
            stage=ready.name,
            command=ready.stage.command,
            fingerprint=ready.fingerprint,
            content=dict(ready.content),
            output=None if ready.output is None else str(ready.output.absolute()),
            needs={name: folders[name] for name in ready.stage.after},
            reads=sorted({name for name, _ in ready.stage.references}),
            children={other.name: folders[other.name] for other in stages if ready.name in other.stage.after},
        )
        for ready in stages
    }


def _run(ready: Ready) -> str | None:
    """Run a stage to its end; return why it is not done, if it is not."""
    attempt = f"local-{int(time.time())}-{os.getpid()}"
    job = ready.job
    job.begin(AttemptRecord(attempt=attempt, began=time.time(), pid=os.getpid()))
    resume = ["--resume", "auto"] if ready.stage.command == "train" else []
    module = f"trainer.{ready.stage.command}" if ready.is_parallel else f"launch.{ready.stage.command}"
    done = subprocess.run(
        [sys.executable, "-m", module, *ready.words, *resume],
        check=False,
    )
    word = job.last_word()
    if word is None and done.returncode == 0:
        job.leave_word("DONE", attempt=attempt, step=None, reason="finished")
    word = job.last_word()
    job.end(attempt, step=word.step if word else None, word=word.word if word else None, reason="")
    if word is None:
        return f"ended with exit code {done.returncode}"
    return None if word.word == "DONE" else word.reason
