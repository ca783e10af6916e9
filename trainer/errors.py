"""The two kinds of failure this project tells apart: the user's mistake and ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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

    passing = False
    """Whether another try may well succeed; a launched job then makes one."""


def format_problems(problems: Sequence[str]) -> str:
    """Lay problems out for a terminal: one line alone, several as a counted list."""
    if len(problems) == 1:
        return f"error: {problems[0]}"
    return "\n".join([f"error: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])


def name_some(names: Sequence[str], limit: int = 10) -> str:
    """Name the first `limit` of many things and count the rest, so that no message runs to pages."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more ({len(names)} in all)"
