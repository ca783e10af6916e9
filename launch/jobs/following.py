"""Printing files that grow, until the job that writes them is over."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

_BLOCK = 1 << 20


@dataclass
class Growing:
    """One growing text file."""

    path: Path
    position: int = 0
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace"))

    def read(self) -> str:
        """Return what was added since the last time; nothing while there is no file. A shorter file begins anew."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.position:
                    self.position = 0
                file.seek(self.position)
                block = file.read(_BLOCK)
        except FileNotFoundError:
            return ""
        self.position += len(block)
        return str(self.decoder.decode(block))


class Printer:
    """Prints several growing files to one place, with a heading where the file changes."""

    def __init__(self, paths: Sequence[Path], out: TextIO) -> None:
        self._files = [Growing(path) for path in paths]
        self._out = out
        self._last: Path | None = None

    def drain(self) -> bool:
        """Print all there is; tell whether there was anything."""
        printed = False
        for file in self._files:
            while text := file.read():
                if len(self._files) > 1 and self._last != file.path:
                    print(f"==> {file.path.name}", file=self._out)
                self._last, printed = file.path, True
                self._out.write(text)
        self._out.flush()
        return printed


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a follower looks, in seconds."""

    files: float = 0.5
    state: float = 5.0
    """SLURM's controller is shared by everybody: once an attempt has ended, it is asked this often."""
    silence: float = 20.0
    """After so long without a word, it is asked whether the job is still there."""


def follow(
    find: Callable[[], tuple[str, Sequence[Path]] | None],
    state: Callable[[], tuple[bool, bool, str]],
    *,
    has_ended: Callable[[str], bool],
    out: TextIO,
    pace: Pace = Pace(),
) -> str:
    """Print the newest attempt's files and go on to the next one until the job is over; return how it ended.

    `find` names the newest attempt and its files (None: none yet), `has_ended` tells whether an attempt is over, and
    `state` asks whether the job is over, whether it works, and what it does now.
    """
    current: str | None = None
    printer: Printer | None = None
    heard = asked = float("-inf")
    told = ""
    while True:
        newest = find()
        if newest is not None and (newest[0] != current or printer is None):
            if printer is not None:
                printer.drain()
            if current != newest[0]:
                _say(f"attempt {newest[0]}")
            current, printer = newest[0], Printer(newest[1], out) if newest[1] else None
            heard, told = time.monotonic(), ""
        if printer is not None and printer.drain():
            heard = time.monotonic()
        quiet = time.monotonic() - heard >= pace.silence
        waiting = current is None or printer is None or quiet or has_ended(current)
        if waiting and time.monotonic() - asked >= pace.state:
            asked = time.monotonic()
            over, works, words = state()
            if over:
                # What was written between the last look and the end.
                final = find()
                if final is not None and final[0] != current:
                    continue
                if printer is not None:
                    printer.drain()
                return words
            if words != told and not (works and printer is not None):
                _say(words)
                told = words
        time.sleep(pace.files)


def _say(text: str) -> None:
    # Beside the log, so that `signscale logs RUN > file` holds the log alone.
    print(f"--- {text}", file=sys.stderr, flush=True)
