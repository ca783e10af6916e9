"""What each rank computes on, by torch's own account, and how quickly it does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.doctor.facts import count_devices
from trainer.doctor.finding import Finding, size
from trainer.doctor.verdicts import check_same, check_speeds

_BUSY = 0.05
"""Share of a device's memory that other processes may hold without a word."""
_SIDE = 4096


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """A rank, as torch sees it."""

    rank: int
    node: str
    torch: str
    cuda: str | None
    """CUDA that torch was built for."""
    nccl: str | None
    devices: int
    """CUDA devices visible to the rank."""
    device: str
    """Name of the one it computes on."""
    capability: str | None
    memory: int
    """Bytes of that device; of the machine on a CPU."""
    free: int
    """Bytes of it that nothing holds."""

    @property
    def label(self) -> str:
        """Name the rank and its node."""
        return f"rank {self.rank} ({self.node})"

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON takes them."""
        return asdict(self)


def find_rank_facts(rank: int, node: str, device: torch.device) -> RankFacts:
    """Look at this rank's device."""
    cuda, nccl = torch.version.cuda, None
    if cuda is not None and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name, capability, free = "CPU", None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if device.type == "cuda":
        free, memory = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return RankFacts(
        rank=rank,
        node=node,
        torch=torch.__version__,
        cuda=cuda,
        nccl=nccl,
        devices=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        device=name,
        capability=capability,
        memory=memory,
        free=free,
    )


def check_devices(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Compare devices and the libraries under torch over the ranks."""
    reinstall = "let all nodes use one environment with one build of torch"
    kind = "ask for nodes of one kind (--constraint), or set CUDA_VISIBLE_DEVICES alike"
    for check, values, mend in (
        (
            "torch build",
            [f"{one.torch}, CUDA {one.cuda or 'none'}, NCCL {one.nccl or 'none'}" for one in ranks],
            reinstall,
        ),
        ("devices", [f"{one.devices} a node" if one.devices else "none (CPU)" for one in ranks], kind),
        ("device", [_describe(one) for one in ranks], kind),
    ):
        found = check_same(check, {one.label: value for one, value in zip(ranks, values, strict=True)}, mend=mend)
        # A rank's fault is its node's.
        nodes = {one.node for one in ranks if one.label in found.nodes}
        if nodes == {one.node for one in ranks}:
            nodes = set()
        yield Finding(
            check=check,
            value=found.value.replace(" nodes", " ranks"),
            verdict=found.verdict,
            mend=found.mend,
            nodes=tuple(sorted(nodes)),
        )
    yield from _unused(ranks)
    held = [one for one in ranks if one.capability and one.free < (1 - _BUSY) * one.memory]
    if held:
        worst = min(held, key=lambda one: one.free / one.memory)
        yield Finding(
            check="device memory",
            value=f"{worst.label}: {size(worst.free)} of {size(worst.memory)} free; others hold the rest",
            verdict="warn",
            mend="end what else runs on the device (nvidia-smi lists it)",
        )


def measure_compute(device: torch.device) -> float:
    """Return operations a second of a matrix product on a CUDA device, the median of some."""
    a = torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    a @ a
    torch.cuda.synchronize(device)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2.0 * _SIDE**3 / sorted(times)[len(times) // 2]


def check_compute(ranks: Sequence[RankFacts], speeds: Sequence[float]) -> Finding:
    """Judge each rank's speed by the median of all."""
    found = check_speeds(
        "compute",
        {one.label: speed for one, speed in zip(ranks, speeds, strict=True)},
        show=lambda speed: f"{speed / 1e12:.1f} TFLOP/s",
        mend="look for a throttled or shared device (nvidia-smi -q -d PERFORMANCE); exclude its node (--exclude)",
    )
    nodes = tuple(sorted({one.node for one in ranks if one.label in found.nodes}))
    return Finding(check=found.check, value=found.value, verdict=found.verdict, mend=found.mend, nodes=nodes)


def _describe(one: RankFacts) -> str:
    if one.capability is None:
        return f"{one.device}, {size(one.memory)}"
    # Of two cards of one kind the driver may keep a little more for itself on one.
    return f"{one.device}, {one.memory / 1e9:.0f} GB, capability {one.capability}"


def _unused(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Name devices that the system has and torch does not use."""
    there = count_devices()
    if there and not any(one.devices for one in ranks) and os.environ.get("ACCELERATE_USE_CPU", "") != "true":
        yield Finding(
            check="devices",
            value=f"{there} in the system, torch {ranks[0].torch} uses none",
            verdict="FAIL",
            mend="install a build of torch for CUDA, at most as new as the driver allows (nvidia-smi shows its CUDA)",
        )
