"""Train a model by a recipe: `python -m trainer.train`, or `accelerate launch … -m trainer.train` on several ranks."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from trainer.assembly import build_run
from trainer.engine import open_engine
from trainer.exits import Outcome, exit_on_input_error
from trainer.job.rank import find_job
from trainer.memory.ladder import Descent, start_again
from trainer.observe.progress import Progress
from trainer.parsing import parse_recipe
from trainer.recipe import Recipe
from trainer.signals import StopRequest


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Parse, build, run, close; return the exit code. Raises `InputError` before anything is written."""
    # Should a shard be cut short in the very moment it is read, the stack at least tells where.
    faulthandler.enable()
    recipe = parse_recipe(sys.argv[1:] if argv is None else argv, "python -m trainer.train")
    try:
        return _train(recipe)
    except Descent as descent:
        start_again(descent.rung)


def _train(recipe: Recipe) -> Outcome:
    with ExitStack() as stack:
        job = find_job()
        stack.callback(job.close)
        engine = open_engine(recipe)
        stack.callback(engine.close)
        progress = Progress(enabled=engine.is_main)
        stack.callback(progress.close)
        stop = StopRequest(job, leads=engine.is_main)
        run = build_run(recipe, engine, progress, stop, job)
        stack.callback(run.relief.close)
        for tracker in run.trackers:
            stack.callback(tracker.close)
        # Before this there is nothing to save, and a signal ends the process as usual.
        stop.install()
        return run.run()


if __name__ == "__main__":
    exit_on_input_error(main)
