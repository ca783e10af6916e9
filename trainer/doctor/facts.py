"""What a node says of itself: versions, limits, shared memory, driver. Needs no torch and no other node."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import socket
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("signscale", "torch", "accelerate", "deepspeed", "numpy", "safetensors")
_ROOT = Path(__file__).resolve().parents[2]
_SHARED_MEMORY = Path("/dev/shm")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """A node, as its own process sees it."""

    node: str
    """As SLURM calls it, else the host name."""
    index: int
    """Number of the node in the job; 0 leads."""
    host: str
    """Host name."""
    python: str
    versions: dict[str, str | None]
    """Of each package; None: not installed."""
    code: str
    """Hash of the project's own files."""
    driver: str | None
    """NVIDIA's kernel driver; None: there is none."""
    devices: int
    """CUDA devices that a job here may use, as far as the system says."""
    shared_memory: int | None
    """Bytes of /dev/shm that are free; None: it is not there."""
    open_files: int
    """Limit of open files a process."""
    cpus: int
    memory: int
    """Bytes of the machine."""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> NodeFacts:
        """Read what `to_json` wrote."""
        return cls(**stored)


def find_facts(node: str, index: int) -> NodeFacts:
    """Look at this node."""
    return NodeFacts(
        node=node,
        index=index,
        host=socket.gethostname(),
        python=platform.python_version(),
        versions={package: _version(package) for package in _PACKAGES},
        code=hash_code(_ROOT),
        driver=_driver(),
        devices=count_devices(),
        shared_memory=_free(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        cpus=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def count_devices(devices: Path = Path("/dev")) -> int:
    """Count the CUDA devices that processes started here would see, without loading CUDA."""
    there = sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    # CUDA takes the names up to the first that is none ("-1", by custom, hides all).
    names = [name.strip() for name in visible.split(",")]
    usable = next((index for index, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return min(there, usable)


def hash_code(root: Path) -> str:
    """Hash the project's modules, so that nodes with different checkouts show."""
    digest = hashlib.sha256()
    for package in ("trainer", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not _DRIVER.is_file():
        return None
    match = re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", _DRIVER.read_text(encoding="utf-8"))
    return match[1] if match else "of unknown version"


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
