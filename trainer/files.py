"""Writing files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def unfenced() -> None:
    """Let everything be published: nobody else writes there."""


def write_text(path: Path, text: str, *, fence: Callable[[], None] = unfenced) -> None:
    """Replace the file by `text`, atomically and durably.

    `fence` is asked right before the rename; what it raises leaves the old content. It is asked again if there is
    nothing left to rename: whoever took this attempt's place has taken that away.
    """
    # Processes of two machines may share a number, and a folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fence()
        replace(temporary, path, fence=fence)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace(source: Path, target: Path, *, fence: Callable[[], None] = unfenced) -> None:
    """Rename; where the source is gone, what `fence` has to say of it comes before `FileNotFoundError`."""
    try:
        source.replace(target)
    except FileNotFoundError:
        fence()
        raise


def write_json(path: Path, content: Any, *, fence: Callable[[], None] = unfenced) -> None:
    """Replace the file by `content` as JSON, atomically and durably; `fence` as for `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", fence=fence)


@dataclass(frozen=True)
class FencedFolder:
    """A folder of a run, where attempts that were cut off and the one that owns the run may meet.

    What changes in it changes through here: `fence` raises in an attempt that has lost the run, and is asked right
    before each change.
    """

    path: Path
    fence: Callable[[], None] = unfenced

    def write_text(self, name: str, text: str) -> None:
        """Replace a file by `text`, as the function does."""
        write_text(self.path / name, text, fence=self.fence)

    def write_json(self, name: str, content: Any) -> None:
        """Replace a file by `content` as JSON, as the function does."""
        write_json(self.path / name, content, fence=self.fence)

    def rename(self, old: str, new: str) -> None:
        """Give what lies there another name."""
        self.fence()
        replace(self.path / old, self.path / new, fence=self.fence)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.fence()
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Take away what others were writing: one that stood still between fence and rename finds nothing to rename."""
        for leftover in self.path.glob(".*.tmp"):
            if leftover.is_file():
                self.remove(leftover.name)


def sync_file(path: Path) -> None:
    """Flush a written file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    sync_file(path)
