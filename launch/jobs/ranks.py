"""The ranks of one node: started by accelerate's own launcher, and their end told in the launcher's stead.

`accelerate launch` ends in a page of stack traces whatever a rank's reason was, at a successful end too when another
node left first. Here its parser and launcher run in this process, and what they raise becomes an exit code.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from trainer.exits import EXIT_INPUT_ERROR
from trainer.job.directory import ATTEMPT, JOB, JobDirectory

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


NUMA_BINDING = "SIGNSCALE_NUMA_BINDING"
"""Environment: how torchrun binds ranks to the cores beside their GPUs (its --numa-binding, which accelerate lacks)."""


def main(argv: Sequence[str]) -> int:
    """Start the ranks as `accelerate launch ARGV…`, or `plain N DIRECTORY MODULE ARGV…`; return the exit code.

    0: all ranks ended well; 2: a rank met a mistake of the user's, which it has told; 1: anything else. Node 0 leaves
    the attempt's last word where the command itself left none.
    """
    launcher, *rest = argv
    code = _run_plainly(rest) if launcher == "plain" else _run_by_accelerate(rest)
    if os.environ.get("SIGNSCALE_NODE", "0") == "0":
        _leave_word(code)
    return code


def _leave_word(code: int) -> None:
    job, attempt = JobDirectory(Path(os.environ[JOB])), os.environ[ATTEMPT]
    if job.last_word() is not None:
        return
    if code == 0:
        job.leave_word("DONE", attempt=attempt, step=None, reason="finished", code=code)
    elif code == EXIT_INPUT_ERROR:
        reason = "a mistake in the input; the log's last lines say which"
        job.leave_word("FAILED", attempt=attempt, step=None, reason=reason, code=code)


def _run_by_accelerate(argv: Sequence[str]) -> int:
    import torch.distributed.run  # noqa: F401  (its loggers must be there to be quietened)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _quieten("torch.distributed")
    _outlive_signals()
    arguments = launch_command_parser().parse_args(list(argv))
    if binding := os.environ.get(NUMA_BINDING):
        # accelerate hands torchrun all that torchrun has a name for.
        arguments.numa_binding = binding
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if EXIT_INPUT_ERROR in codes:
            return EXIT_INPUT_ERROR
        rank, first = error.get_first_failure()
        print(
            f"signscale: rank {rank} ended first, {_name_end(first.exitcode)}; its own lines say why", file=sys.stderr
        )
        return 1
    except SignalException as error:
        print(f"signscale: {error.sigval.name} was passed on to the ranks, which have left", file=sys.stderr)
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:
        # A single process needs no torchrun; accelerate reports its code this way.
        return EXIT_INPUT_ERROR if error.returncode == EXIT_INPUT_ERROR else 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _quieten(package: str) -> None:
    """Silence the loggers of a package: torchrun reports in pages what the ranks have said in a line."""
    for name in [package, *logging.root.manager.loggerDict]:
        if name == package or name.startswith(f"{package}."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _outlive_signals() -> None:
    """Leave signals to the ranks: torchrun passes them on; a single rank gets them itself, and is waited for."""
    for name in SIGNALS:
        # A handler, since what is ignored would stay ignored in the rank.
        signal.signal(getattr(signal, name), lambda number, frame: None)


def _name_end(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _run_plainly(argv: Sequence[str]) -> int:
    """Start processes with RANK and WORLD_SIZE, pass signals on, and end all when one fails."""
    count, folder, module, *arguments = argv
    first, world = int(os.environ.get("SIGNSCALE_NODE", "0")) * int(count), int(os.environ["WORLD_SIZE"])
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for name in SIGNALS:
        signal.signal(getattr(signal, name), pass_on)
    for local in range(int(count)):
        logs = Path(folder) / "plain" / "attempt_0" / str(local)
        logs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"RANK": str(first + local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world)}
        processes.append(
            subprocess.Popen([sys.executable, "-u", "-m", module, *arguments], env=environment, start_new_session=True)
        )
    waiting = list(processes)
    while waiting:
        # Asked one by one: os.wait() misses those that a signal passed on, or sent here, has found ended.
        ended = [process for process in waiting if process.poll() is not None]
        waiting = [process for process in waiting if process not in ended]
        if any(process.returncode for process in ended):
            for process in waiting:
                process.terminate()
        if not ended:
            time.sleep(0.05)
    codes = [process.returncode for process in processes]
    return EXIT_INPUT_ERROR if EXIT_INPUT_ERROR in codes else int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
