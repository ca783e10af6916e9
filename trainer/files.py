"""Writing files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, *, fence: Callable[[], None] = lambda: None) -> None:
    """Replace the file by `text`, atomically and durably.

    `fence` is asked right before the rename; what it raises leaves the old content.
    """
    # Processes of two machines may share a number, and a folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fence()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, content: Any, *, fence: Callable[[], None] = lambda: None) -> None:
    """Replace the file by `content` as JSON, atomically and durably; `fence` as for `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", fence=fence)


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
