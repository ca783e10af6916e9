"""The code as it was when a job was submitted: a copy that later edits do not reach."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from pathlib import Path

from launch.jobs.plan import Code
from trainer.errors import InputError
from trainer.files import write_json
from trainer.shipped import INSIDE

ROOT = Path(__file__).resolve().parents[2]
"""Folder that the packages lie in."""
NOTE, DIFFERENCE = "snapshot.json", "diff.patch"
_PACKAGES = ("trainer", "launch")
_FOLDERS_BESIDE = ("accelerate_configs", "ds_configs")
_MOST_MEGABYTES = 100
_KEYS = (
    *(".env", ".env.*", "*.key", "*.pem", "*.p12", "*.pfx", ".netrc", "_netrc", "credentials*", ".credentials*"),
    *("id_rsa*", "id_ed25519*", "id_ecdsa*", ".pypirc", ".npmrc", ".aws", ".ssh"),
)
"""Names of files and folders that hold keys: others may read a run, and nobody expects them there."""


def describe_code(root: Path = ROOT) -> Code:
    """Name the commit, and whether files differ from it."""
    if not _is_repository(root):
        return Code()
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD", check=False).strip() or None
    return Code(commit=commit, changed=bool(_git(root, "status", "--porcelain").strip()))


def list_files(root: Path = ROOT) -> list[Path]:
    """List what a snapshot holds, relative to `root`: what git does not ignore, or the packages where there is no git.

    Untracked files that may hold keys are left out (`list_keys`). Raises `InputError` if it is more than code can be.
    """
    if _is_repository(root):
        names = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        present = {Path(name) for name in names if name and _is_there(root / name)}
        files = sorted(present - set(list_keys(root)))
    else:
        files = sorted(
            path.relative_to(root)
            for name in (*_PACKAGES, *_FOLDERS_BESIDE)
            for path in (root / name).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        )
    sizes = {path: (root / path).lstat().st_size / 1e6 for path in files}
    if sum(sizes.values()) > _MOST_MEGABYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        raise InputError(
            f"{root}: a job takes a copy of the code along, and what git does not ignore here is "
            f"{sum(sizes.values()):.0f} MB (at most {_MOST_MEGABYTES}); the largest files are "
            + ", ".join(f"{path} ({sizes[path]:.0f} MB)" for path in largest)
            + "; name data and results in .gitignore, or move them out"
        )
    return files


def list_keys(root: Path = ROOT) -> list[Path]:
    """List files that by their names hold keys, which no snapshot takes along unless git tracks them."""
    if not _is_repository(root):
        return []
    names = _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    return sorted(path for path in map(Path, filter(None, names)) if any(map(_is_key, path.parts)))


def take_snapshot(target: Path, root: Path = ROOT) -> Code:
    """Copy the code to `target`, in place of an older copy, with the commit and what differs from it."""
    code = describe_code(root)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for path in list_files(root):
        source = root / path
        # Of an installation too a copy looks like a checkout: the job names configurations relative to it.
        copy = fresh / (path.relative_to(INSIDE) if path.is_relative_to(INSIDE) else path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() and not source.resolve().is_relative_to(root):
            copy.symlink_to(source.resolve())
        else:
            shutil.copy2(source, copy, follow_symlinks=False)
    if code.commit:
        plain = ("--no-color", "--no-ext-diff", "--no-textconv")
        (fresh / DIFFERENCE).write_bytes(_git_bytes(root, "diff", "--binary", *plain, "HEAD"))
    write_json(fresh / NOTE, {"commit": code.commit, "changed": code.changed, "root": str(root)})
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
    return code


def _is_repository(root: Path) -> bool:
    """Tell whether the code itself is tracked: a virtual environment may lie in somebody else's repository."""
    if shutil.which("git") is None:
        return False
    return bool(_git(root, "ls-files", "--", "trainer/__init__.py", check=False).strip())


def _is_key(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _KEYS)


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _git(root: Path, *arguments: str, check: bool = True) -> str:
    return os.fsdecode(_git_bytes(root, *arguments, check=check))


def _git_bytes(root: Path, *arguments: str, check: bool = True) -> bytes:
    """Return what git says as it says it: files may be in any encoding, with any ends of lines."""
    answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    if check and answer.returncode:
        raise InputError(f"{root}: git {arguments[0]} failed: {answer.stderr.decode(errors='replace').strip()}")
    return answer.stdout if answer.returncode == 0 else b""
