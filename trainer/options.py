"""Command lines of the smaller commands: mistakes are reported as every other mistake of the user is."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trainer.errors import InputError

FPS = 25.0
"""Frames per second of clips, where neither the user nor a file tells."""


class OptionParser(argparse.ArgumentParser):
    """An argument parser that raises `InputError`, and names the nearest option for one it does not know."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Report a mistake; `--help` is the mend that always applies."""
        raise InputError(f"{self.prog}: {message}; --help lists the options")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line."""
        words = list(sys.argv[1:] if argv is None else argv)
        self._refuse_unknown(words, [])
        return self.parse_args(words)

    def parse_beside_recipe(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse a command line that may hold the flags of a recipe too; return its own options, and those flags."""
        # Imported here: it takes half a second that the other commands need not wait for.
        from trainer.parsing import field_names

        options, rest = self.parse_known_args(list(argv))
        self._refuse_unknown(rest, [f"--{name}" for name in (*field_names(), "config", "print_config")])
        return options, rest

    def _refuse_unknown(self, words: Sequence[str], others: Sequence[str]) -> None:
        # Before anything else: a misspelled option should not be reported as a missing one.
        known = [*others, *(flag for action in self._actions for flag in action.option_strings)]
        problems = []
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            if flag not in known:
                nearest = difflib.get_close_matches(flag, known, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the options"
                problems.append(f"{self.prog}: unknown option {flag}; {hint}")
        if problems:
            raise InputError(problems)


def positive_count(text: str) -> int:
    """Read a whole number of at least 1, for argparse's `type`."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def number_from_0(text: str) -> int:
    """Read the number of a rank, a task and the like, for argparse's `type`."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, found {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Read a finite number above 0, for argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value
