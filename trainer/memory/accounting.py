"""How much memory a rank may use, how much it uses, and how much a piece of work takes at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

_SAMPLE_SECONDS = 0.002
_FRAGMENTED = 0.25
_CGROUP_ROOT, _CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Numbers of glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE = 1 << 17
_NO_LIMIT = 1 << 60
"""What a cgroup without a limit says is near 2^63."""


def capacity(device: torch.device) -> int | None:
    """Return the bytes that this rank may use in all, on the device that it computes on; None if nothing says so.

    CUDA: the device's memory times the fraction granted to this process, less what other processes hold of it now.

    CPU: the least of three. The process's limit of address space (RLIMIT_AS), less the address space that is reserved
    and holds nothing: what remains is comparable with resident memory. The limit of the cgroup, and the machine's
    memory, shared evenly by the node's ranks (LOCAL_WORLD_SIZE).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        limit = granted(device)
        assert limit is not None
        return min(limit, free + torch.cuda.memory_reserved(device))
    found = [limit for limit in (_address_limit(), host_limit(), _machine_memory()) if limit is not None]
    return min(found) if found else None


def granted(device: torch.device) -> int | None:
    """Return what the limits alone grant this rank, in bytes: the same in every run on the same hardware."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(device))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    address = None if soft == resource.RLIM_INFINITY else soft
    found = [limit for limit in (address, host_limit(), _machine_memory()) if limit is not None]
    return min(found) if found else None


def device_name(device: torch.device) -> str:
    """Name the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def is_limited(device: torch.device) -> bool:
    """Tell whether something grants this rank less than its share of the machine: on CUDA always."""
    return device.type == "cuda" or _address_limit() is not None or host_limit() is not None


def host_limit() -> int | None:
    """Return this rank's share of the cgroup's memory limit; None if there is none below the machine's memory."""
    machine = _machine_memory()
    limits = [limit for limit in _cgroup_limits() if machine is None or limit // local_ranks() < machine]
    return min(limits) // local_ranks() if limits else None


def local_ranks() -> int:
    """Count the ranks that share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def in_use(device: torch.device) -> int:
    """Return the bytes that count against `capacity` now: allocated by tensors on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def resident_files() -> int:
    """Return the bytes of files that are mapped and resident, libraries above all; a part of what a CPU has in use."""
    return _status("RssFile")


def trim() -> None:
    """Give freed host memory back to the system, so that what is resident is what is used (glibc alone can)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def spare_address_space() -> None:
    """Where address space is limited, have large tensors' memory given back as soon as they are gone (glibc alone can).

    glibc otherwise keeps it in pieces that fit no larger tensor: after memory ran out once, a pass of a tenth of the
    size ran out too. It costs time, and no other limit needs it.
    """
    if _address_limit() is not None:
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            libc.mallopt(_M_ARENA_MAX, 1)


class PeakMeter:
    """Context that measures the peak memory of a block of work on one device.

    CUDA: torch's own counters, of the tensors and of what the allocator holds. CPU: the kernel's high-water mark of
    resident memory, reset at the start; where that is not allowed, samples of a thread.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = 0
        """Bytes in use when the block began."""
        self.peak = 0
        """Most bytes in use during the block, those at its start included."""
        self.reserved = 0
        """Most bytes that the allocator held during the block; on a CPU the peak."""
        self._sampler: _Sampler | None = None

    @property
    def beyond_start(self) -> int:
        """Return what the block took beyond what was in use before it."""
        return max(0, self.peak - self.start)

    def __enter__(self) -> PeakMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            trim()
            self._sampler = None if _reset_high_water() else _Sampler()
        self.start = in_use(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
            return
        self.peak = self._sampler.stop() if self._sampler is not None else _status("VmHWM")
        self.reserved = self.peak


@dataclass(frozen=True, kw_only=True)
class Fragmentation:
    """Memory that the CUDA allocator holds and no tensor uses."""

    share: float
    """Of what is held, the part that is not used."""
    hint: str
    """What to do about it; empty where it is no problem."""


def fragmentation(device: torch.device) -> Fragmentation | None:
    """Return how much of the allocator's memory lies idle; None on a CPU."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device)
    share = 1.0 - torch.cuda.memory_allocated(device) / reserved if reserved else 0.0
    return Fragmentation(share=share, hint=fragmentation_hint(share, os.environ))


def fragmentation_hint(share: float, environment: os._Environ[str] | dict[str, str]) -> str:
    """Say what helps against a share of idle memory; empty where nothing needs to, or it is on already."""
    settings = environment.get("PYTORCH_ALLOC_CONF", "") + environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if share < _FRAGMENTED or "expandable_segments:True" in settings:
        return ""
    return (
        f"{100 * share:.0f} % of the GPU memory held lies idle between tensors; set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )


class _Sampler:
    """Highest resident memory as a thread saw it."""

    def __init__(self) -> None:
        self._highest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._highest, _resident())

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark of resident memory to what is resident now; False where that is refused."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Return a size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _address_limit() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    # Libraries and the stacks of threads take address space without holding memory.
    return max(0, soft - (_status("VmSize") - _status("VmRSS")))


def _machine_memory() -> int | None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024 // local_ranks()
    return None


def _cgroup_limits() -> Iterator[int]:
    """Yield the memory limits of this process's cgroup and of those above it, versions 1 and 2."""
    try:
        lines = _CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = _CGROUP_ROOT, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = _CGROUP_ROOT / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        # Inside a container the path may be that of the host, while the root is the container's own.
        for place in (folder, *folder.parents):
            if base not in (place, *place.parents):
                break
            limit = _read_limit(place / name)
            if limit is not None:
                yield limit


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None
