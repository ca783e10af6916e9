"""The two kinds of failure this project tells apart: the user's mistake and ours."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from trainer.orphans import end_with_launcher

EXIT_INPUT_ERROR = 2
"""Exit code of a user's mistake; 1 stays the code of a failure of ours."""

_SECONDS_FOR_RANK_0 = 30.0
"""How long a silent rank leaves rank 0 the floor: a launcher ends all ranks as soon as the first one has left."""

_LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says when the process at the other end is gone (a RuntimeError without a type of its own)."""


class InputError(Exception):
    """Report what is wrong with the user's input, in full, and how to mend it.

    Every message names the file, line or key, what was expected, and the mend. Several problems found
    in one pass travel in one error, so that the user mends them in one go.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if not self.problems:
            raise ValueError("an InputError needs at least one problem")
        super().__init__("\n".join(self.problems))
        self.local = False
        """Whether one rank alone knows of it."""

    def __reduce__(self) -> tuple[type[InputError], tuple[tuple[str, ...]]]:
        # Exceptions travel between ranks and worker processes; the default rebuild would join the problems.
        return (type(self), (self.problems,))


class TrainingFailedError(Exception):
    """End a run that cannot go on although its input was right; exit code 1, message without a traceback."""

    local = False
    """Whether one rank alone knows of it."""


def format_problems(problems: Sequence[str]) -> str:
    """Lay problems out for a terminal: one line alone, several as a counted list."""
    if len(problems) == 1:
        return f"error: {problems[0]}"
    return "\n".join([f"error: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])


def name_some(names: Sequence[str], limit: int = 10) -> str:
    """Name the first `limit` of many things and count the rest, so that no message runs to pages."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more ({len(names)} in all)"


def exit_on_input_error(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with its exit code; an `InputError` becomes one message and exit code 2.

    All ranks meet the same error, because what one of them finds is shared before it is raised: rank 0 speaks for all,
    and the others leave after it. An error marked `local` is known to one rank alone, which therefore speaks; the
    ranks that wait for it in vain say so in a line each.
    """
    end_with_launcher()
    try:
        code = main() or 0
    except InputError as error:
        _speak(format_problems(error.problems), alone=error.local)
        code = EXIT_INPUT_ERROR
    except TrainingFailedError as error:
        _speak(f"failed: {error}", alone=error.local)
        code = 1
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
