"""Command lines of the smaller commands: mistakes are reported as every other mistake of the user is."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trainer.errors import InputError


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
        known = [flag for action in self._actions for flag in action.option_strings]
        # Before anything else: a misspelled option should not be reported as a missing one.
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            if flag not in known:
                nearest = difflib.get_close_matches(flag, known, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the options"
                raise InputError(f"{self.prog}: unknown option {flag}; {hint}")
        return self.parse_args(words)
