"""What ranks say, on the terminal as they said it and in a log."""

from __future__ import annotations

import errno
import os
import pty
import sys
import termios
import tty
from pathlib import Path
from types import TracebackType


class Terminal:
    """Copies what processes write to `theirs` to standard output and to a log.

    On a terminal they see a terminal too, so that bars are drawn; elsewhere a pipe. The log keeps whole lines, not the
    states of a bar. A terminal that is gone does not end the copying.
    """

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab", buffering=0)
        self._shown = True
        self._line = b""
        if sys.stdout.isatty():
            self._ours, self.theirs = pty.openpty()
            tty.setraw(self.theirs)
            termios.tcsetwinsize(self.theirs, termios.tcgetwinsize(sys.stdout.fileno()))
        else:
            self._ours, self.theirs = os.pipe()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._ours)
        self._keep(b"\n" if self._line else b"")
        self._log.close()

    def copy_until_closed(self) -> None:
        """Copy until no process can write any more."""
        os.close(self.theirs)
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError as error:
                if error.errno == errno.EIO:
                    # How a pseudo-terminal says that nobody holds its other end.
                    return
                raise
            if not data:
                return
            self._show(data)
            self._keep(data)

    def say(self, text: str) -> None:
        """Add a line of the launcher's own."""
        self._show(text.encode() + b"\n")
        self._keep(text.encode() + b"\n")

    def _show(self, data: bytes) -> None:
        if not self._shown:
            return
        try:
            while data:
                data = data[os.write(sys.stdout.fileno(), data) :]
        except OSError:
            # Hung up, or the reader of a pipe left: the log goes on.
            self._shown = False

    def _keep(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._log.write(line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n")
