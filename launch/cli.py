"""`signscale`: one command, a sub-command each. Answers `--help` without importing torch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from trainer.errors import InputError
from trainer.exits import EXIT_INPUT_ERROR, exit_on_input_error

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("trainer.train", "train a model by a recipe, on this process alone"),
    "launch": ("launch.launch", "start a command: to debug it, on this machine's devices, or on a cluster"),
    "extract": ("trainer.extract", "extract a teacher's soft targets, which students learn from"),
    "evaluate": ("trainer.evaluate", "evaluate a run or a checkpoint on a split"),
    "export": ("launch.export", "export a trained model as one file that needs no run"),
    "predict": ("launch.predict", "print what is signed in clips, and when"),
    "pack": ("launch.pack", "pack a feature corpus into shards that train faster"),
    "synth": ("launch.synth", "write a synthetic corpus"),
    "plan": ("launch.plan", "show what steps a recipe makes of a corpus on any number of ranks"),
    "estimate": ("launch.estimate", "show what a recipe needs of memory under each backend, and what fits"),
    "doctor": ("launch.doctor", "look at machines, corpus and run on all ranks, before GPU hours are spent"),
    "describe": ("launch.describe", "show what a model costs: parameters, operations, time on a CPU"),
    "sweep": ("launch.sweep.table", "show the runs of a sweep, best first"),
    "pipeline": ("launch.pipeline", "run the stages of a pipeline file, here or on SLURM, each after those it needs"),
    "compare": ("launch.compare", "put runs side by side: word error rate, size, speed, and whether the target is met"),
    "jobs": ("launch.job_list", "list the runs below a folder: what each is doing, and where"),
    "status": ("launch.job_status", "show what a run and its job are doing, how far they are, what to type next"),
    "logs": ("launch.job_logs", "print what a job said, and follow it over its requeues"),
    "cancel": ("launch.job_cancel", "end a job for good, once it has saved"),
    "score": ("launch.score", "score a hypothesis file against a reference file"),
}

_USAGE = """usage: signscale COMMAND [options]

Train continuous sign-language recognition: a sentence of signs in, a sequence of glosses out.

commands:
{commands}

`signscale COMMAND --help` lists the options of a command. Several ranks, here or on a cluster, are started by
  signscale launch local|slurm [options] -- train [options]
"""


def run(argv: Sequence[str]) -> int:
    """Run one sub-command and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
        print(_USAGE.format(commands="\n".join(lines)), end="")
        return 0 if argv else EXIT_INPUT_ERROR
    if argv[0] == "train" and {"-h", "--help", "--print_config"} & set(argv[1:]):
        # A question about the recipe need not wait for torch.
        from trainer.parsing import parse_recipe

        parse_recipe(argv[1:])
    if argv[0] in ("train", "evaluate", "extract") and "--on" in argv:
        return _start_on(argv)
    if argv[0] not in COMMANDS:
        raise InputError(f"unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}")
    code: int | None = importlib.import_module(COMMANDS[argv[0]][0]).main(list(argv[1:]))
    # As it is: an exit code may say more than its number (`trainer.exits.Outcome`).
    return 0 if code is None else code


def _start_on(argv: Sequence[str]) -> int:
    """Read `train --on slurm …` as `launch slurm -- train …`."""
    words = list(argv)
    place = words.index("--on")
    if place + 1 == len(words):
        raise InputError("--on: say where: debug, local or slurm")
    way = words[place + 1]
    del words[place : place + 2]
    return int(importlib.import_module("launch.launch").main([way, "--", *words]) or 0)


def main() -> None:
    """Enter from the console script."""
    exit_on_input_error(_run_typed)


def _run_typed() -> int:
    try:
        try:
            return run(sys.argv[1:])
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # Whoever reads, `| head` say, has seen enough. What is still buffered must not meet the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    main()
