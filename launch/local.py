"""All devices of this machine: `accelerate launch` with what fits them, and an end that loses nothing."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import yaml

from launch.jobs.options import LocalOptions
from launch.jobs.plan import Plan
from launch.jobs.ranks import NUMA_BINDING, SIGNALS
from launch.jobs.snapshot import ROOT
from launch.jobs.terminal import Terminal
from trainer.errors import InputError
from trainer.exits import EXIT_INPUT_ERROR
from trainer.job.directory import ATTEMPT, JOB, TOKEN, AttemptRecord, JobDirectory
from trainer.shipped import SHIPPED

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_TO_SAVE = 3600


def choose_devices(options: LocalOptions, named: str) -> tuple[int, bool, str]:
    """Return how many ranks there shall be, whether they compute on CPUs, and accelerate's configuration."""
    from launch.prepare import find_accelerate_config

    gpus = 0 if options.cpu else count_gpus()
    ranks = options.processes or max(1, gpus)
    if gpus and ranks > gpus:
        raise InputError(
            f"--processes {ranks}: {gpus} GPU(s) are visible, and each rank needs one; lower it, or add --cpu"
        )
    if named:
        name = named
    elif gpus:
        name = "multi_gpu" if ranks > 1 else "single_gpu"
    else:
        name = "multi_cpu" if ranks > 1 else "debug_cpu"
    return ranks, not gpus, str(find_accelerate_config(name))


def count_gpus() -> int:
    """Count the GPUs that a process of this machine would see."""
    # As late as possible: it takes seconds that a question for help need not wait for.
    import torch

    return torch.cuda.device_count()


def run(plan: Plan) -> int:
    """Run a plan to its end; return 0 (done, or stopped on request), 2 (a mistake in the input) or 1."""
    job = plan.job
    attempt = f"local-{int(time.time())}-{os.getpid()}"
    job.begin(AttemptRecord(attempt=attempt, began=time.time(), host=platform.node(), pid=os.getpid()))
    job.logs.mkdir(exist_ok=True)
    with Terminal(job.logs / f"{attempt}.log") as terminal:
        ranks = subprocess.Popen(
            launcher_command(plan),
            env=environment(plan, job, attempt),
            stdin=subprocess.DEVNULL,
            stdout=terminal.theirs,
            stderr=terminal.theirs,
            # Signals of the terminal are ours alone; the ranks are asked once, by us.
            start_new_session=True,
        )
        requests = _Requests(job, ranks, terminal)
        requests.install()
        terminal.copy_until_closed()
        code = ranks.wait()
    return conclude(job, attempt, code, asked=requests.asked, at_once=requests.at_once)


def conclude(job: JobDirectory, attempt: str, code: int, *, asked: bool, at_once: bool) -> int:
    """Record the end of an attempt; return the exit code of the command.

    `asked`: somebody wanted it to stop; `at_once`: without saving. What counts is the last word: who asked for the end
    of a run has to know whether it was saved.
    """
    word = job.last_word()
    if at_once:
        reason = "ended at once, on request"
    elif word is not None:
        reason = word.reason
    elif asked and code < 0:
        reason = "stopped on request, before there was anything to save"
    elif asked:
        reason = f"asked to save and stop, ended with exit code {code} and no last word"
    else:
        reason = f"ended with exit code {code}"
    job.end(attempt, step=word.step if word else None, word=word.word if word else None, reason=reason)
    if code == EXIT_INPUT_ERROR and not at_once:
        return EXIT_INPUT_ERROR
    if at_once or word is None or word.word == "FAILED":
        return 1
    return 0 if code == 0 or word.word == "RESUME" else 1


def launcher_command(plan: Plan) -> list[str]:
    """Return the command that starts the ranks."""
    start = [plan.interpreter, "-m", "launch.jobs.ranks"]
    if plan.launcher == "plain":
        logs = str(plan.job.logs / "plain")
        return [*start, "plain", str(plan.ranks_per_node), logs, plan.module, *plan.arguments]
    assert plan.accelerate_config is not None
    config = Path(plan.accelerate_config)
    command = [*start, "accelerate", "--config_file", str(config), "--num_processes", str(plan.ranks_per_node)]
    command += ["--num_cpu_threads_per_process", str(plan.cpus_per_rank), *_zero_flags(config)]
    return [*command, "-m", plan.module, *plan.arguments]


def environment(plan: Plan, job: JobDirectory, attempt: str) -> dict[str, str]:
    """Return the environment of the ranks."""
    found = dict(os.environ)
    found |= {
        JOB: str(job.folder),
        ATTEMPT: attempt,
        TOKEN: attempt,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PET_SIGNALS_TO_HANDLE": ",".join(SIGNALS),
        "PET_SHUTDOWN_TIMEOUT": str(_SECONDS_TO_SAVE),
        "WORLD_SIZE": str(plan.world_size),
    }
    found.setdefault("OMP_NUM_THREADS", str(plan.cpus_per_rank))
    if plan.use_cpu:
        found["ACCELERATE_USE_CPU"] = "true"
    elif shutil.which("numactl") and count_numa_nodes() > 1:
        # Each rank on the cores and the memory beside its GPU.
        found.setdefault(NUMA_BINDING, "node")
    return found


def count_numa_nodes() -> int:
    """Count the memory nodes of this machine."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


def _zero_flags(config: Path) -> Iterator[str]:
    """Name DeepSpeed's own file absolutely where the configuration names it relative to the code."""
    content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    named = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if named and not Path(named).exists() and (SHIPPED / named).exists():
        yield from ("--deepspeed_config_file", str(SHIPPED / named))


class _Requests:
    """Signals that ask for the end: the first saves and stops; a second Ctrl-C, and nothing else, ends all at once.

    A terminal that closes, a shell that logs out and systemd send several signals without meaning more than one.
    """

    def __init__(self, job: JobDirectory, ranks: subprocess.Popen[bytes], terminal: Terminal) -> None:
        self.job = job
        self.ranks = ranks
        self.terminal = terminal
        self.asked = False
        self.at_once = False
        self._interrupts = 0

    def install(self) -> None:
        """Listen; a hang-up that whoever started this wants ignored (nohup) stays ignored."""
        for number in _REQUESTS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        name = signal.Signals(number).name
        if self._interrupts > 1:
            self.at_once = True
            self.terminal.say("signscale: stopping at once")
            for process in (self.ranks.pid, *descendants(self.ranks.pid)):
                _kill(process)
            return
        how = f"Ctrl-C{' once more' if self._interrupts else ' twice'} stops at once"
        if self.asked:
            self.terminal.say(f"signscale: {name}: saving and stopping already; {how}")
            return
        self.asked = True
        self.terminal.say(f"signscale: {name}: saving and stopping; {how}")
        self.job.request_stop(f"{name} to the launcher")
        # torchrun passes it on to ranks that already listen, and ends those that have nothing to save yet.
        _signal_group(self.ranks.pid, signal.SIGTERM)


def descendants(root: int) -> list[int]:
    """List the processes below one, torchrun's ranks too, which have sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(root, []))
    for process in found:
        found += children.get(process, [])
    return found


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
