"""The manifest of a checkpoint: size and SHA-256 of every file in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trainer.files import sync_file, write_json

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path) -> None:
    """Checksum and flush every file of the folder, then write the manifest, last."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None if every byte is as it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = content["format"], content["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:
        return f"{folder / MANIFEST}: cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST}: is no manifest"
    if version != FORMAT:
        return f"{folder / MANIFEST}: has format {version}, this version reads {FORMAT}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: is missing"
        if path.stat().st_size != size:
            return f"{path}: has {path.stat().st_size} bytes, {size} were written"
        if _sha256(path) != digest:
            return f"{path}: its checksum is not the one written with it"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
