"""How a command leaves: its exit code, one message for all ranks, and the last word that its job goes by."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from trainer.errors import InputError, TrainingFailedError, format_problems
from trainer.job.directory import Word
from trainer.job.rank import find_job
from trainer.orphans import end_with_launcher

EXIT_INPUT_ERROR = 2
"""Exit code of a user's mistake; 1 stays the code of a failure of ours."""

_SECONDS_FOR_RANK_0 = 30.0
"""How long a silent rank leaves rank 0 the floor: a launcher ends all ranks as soon as the first one has left."""

_LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says when the process at the other end is gone (a RuntimeError without a type of its own)."""


class Outcome(int):
    """An exit code, and what it stands for: a launched job is told."""

    reason: str
    """One line for people."""
    step: int | None
    """Newest optimizer step that is saved, or whatever else counts progress (None: nothing does)."""
    word: Word
    """DONE, or RESUME where the same command has to go on."""

    def __new__(cls, code: int, reason: str, *, step: int | None = None, word: Word = "DONE") -> Outcome:
        """Make one of an exit code."""
        outcome = super().__new__(cls, code)
        outcome.reason, outcome.step, outcome.word = reason, step, word
        return outcome


def exit_on_input_error(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with its exit code; an `InputError` becomes one message and exit code 2.

    All ranks meet the same error, because what one of them finds is shared before it is raised: rank 0 speaks for all,
    and the others leave after it. An error marked `local` is known to one rank alone, which therefore speaks; the
    ranks that wait for it in vain say so in a line each.

    Within a launched job, whoever speaks also leaves the job's last word (`trainer.job`): DONE or RESUME as `main`'s
    `Outcome` says, FAILED after an error that another try would repeat. What nobody foresaw leaves none, and neither
    does a process that replaces itself.
    """
    end_with_launcher()
    try:
        returned = main()
        outcome = returned if isinstance(returned, Outcome) else Outcome(returned or 0, "finished")
        if _rank() == 0:
            find_job().leave_word(outcome.word, step=outcome.step, reason=outcome.reason, code=int(outcome))
        code = int(outcome)
    except InputError as error:
        code = EXIT_INPUT_ERROR
        _speak(format_problems(error.problems), alone=error.local)
        _leave_failure("; ".join(error.problems), code, alone=error.local)
    except TrainingFailedError as error:
        code = 1
        _speak(f"failed: {error}", alone=error.local)
        if not error.passing:
            _leave_failure(str(error), code, alone=error.local)
    except RuntimeError as error:
        if not any(text in str(error) for text in _LOST_CONTACT):
            raise
        print(f"rank {_rank()}: another rank has left; its own message says why", file=sys.stderr, flush=True)
        code = 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is closed by now. Gloo's threads may outlive the interpreter's end and then abort the process,
        # which a launcher reports as the failure of a run that succeeded (pytorch/pytorch#190489).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_failure(reason: str, code: int, *, alone: bool) -> None:
    """Tell the job that another try would fail alike; it may be the job's own files that cannot be read."""
    if _rank() != 0 and not alone:
        return
    try:
        find_job().leave_word("FAILED", step=None, reason=reason, code=code)
    except (InputError, OSError) as error:
        print(f"error: the job is not told of this failure: {error}", file=sys.stderr, flush=True)


def _speak(message: str, *, alone: bool = False) -> None:
    """Print the message on rank 0; on another rank wait, so that no launcher ends rank 0 before it has spoken."""
    if _rank() == 0 or alone:
        print(message, file=sys.stderr, flush=True)
        return
    # The launcher's wish to end this process, once rank 0 has left, is what the wait is for.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_SECONDS_FOR_RANK_0)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
