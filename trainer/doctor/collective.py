"""All-reduce over all ranks: whether every value is right, and how quick it is by size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.doctor.finding import Finding, size

_SIZES = (4_000, 1_000_000, 16_000_000, 64_000_000)
_SIZES_ON_CUDA = (*_SIZES, 256_000_000)
_SECONDS = 0.4
_MOST_TIMES = 20
_LONG = 1.0
_TIMEOUT = timedelta(seconds=60)
_SLOW_NODE, _SLOW_FABRIC = 2e9, 1e9
"""Bytes a second of GPUs below which something of the fabric is surely not used: within a node, between nodes."""


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """All-reduces of one size, as this rank saw them."""

    bytes: int
    seconds: float
    """Of one all-reduce, the slowest rank's."""
    wrong: int
    """Elements that are not the sum."""


def measure_all_reduce(device: torch.device, rank: int, world_size: int) -> list[Reduced]:
    """All-reduce tensors of several sizes; every rank must call it. A limit of its own keeps it from hanging."""
    group = dist.new_group(timeout=_TIMEOUT)
    found = []
    for count in _SIZES_ON_CUDA if device.type == "cuda" else _SIZES:
        pattern = torch.arange(count // 4, device=device, dtype=torch.float32) % 1024
        values = pattern + rank
        first = _timed(values, group, device)
        # Whole numbers of this size are exact in float32, so that a single wrong bit shows.
        expected = pattern * world_size + world_size * (world_size - 1) // 2
        wrong = int((values != expected).sum())
        times = torch.tensor([first], dtype=torch.float64)
        slowest = _slowest(times, device, group)
        again = max(1, min(_MOST_TIMES, int(_SECONDS / max(slowest, 1e-6))))
        seconds = min(_timed(values.fill_(1.0), group, device) for _ in range(again))
        found.append(Reduced(bytes=count, seconds=_slowest(torch.tensor([seconds]), device, group), wrong=wrong))
        if found[-1].seconds > _LONG:
            # So slow a fabric need not be asked for more; all ranks know the same time.
            break
    dist.destroy_process_group(group)
    return found


def check_all_reduce(
    found: Sequence[Sequence[Reduced]], nodes: Sequence[str], *, backend: str, on_cuda: bool
) -> Iterator[Finding]:
    """Judge what all ranks saw; `nodes`: the node of each rank."""
    check = "all-reduce"
    wrong = [rank for rank, mine in enumerate(found) if any(one.wrong for one in mine)]
    if wrong:
        at = next(one for one in found[wrong[0]] if one.wrong)
        bad = sorted({nodes[rank] for rank in wrong})
        yield Finding(
            check=check,
            value=f"wrong on {len(wrong)} of {len(found)} ranks: {at.wrong} of {size(at.bytes)} on rank {wrong[0]}",
            verdict="FAIL",
            mend="do not train on these nodes: exclude them (--exclude), and try NCCL_P2P_DISABLE=1 to find the link",
            nodes=tuple(bad) if len(bad) < len(set(nodes)) else (),
        )
        return
    world_size = len(found)
    speeds = [2 * (world_size - 1) / world_size * one.bytes / one.seconds for one in found[0]]
    shown = ", ".join(
        f"{size(one.bytes)} {1e3 * one.seconds:.3g} ms" + (f" ({size(speed)}/s)" if one.bytes >= 1_000_000 else "")
        for one, speed in zip(found[0], speeds, strict=True)
    )
    several = len(set(nodes)) > 1
    slow = on_cuda and max(speeds) < (_SLOW_FABRIC if several else _SLOW_NODE)
    mend = (
        "see that NCCL uses InfiniBand or the fast interface (NCCL_DEBUG=INFO, NCCL_IB_DISABLE, NCCL_SOCKET_IFNAME)"
        if several
        else "see that NCCL uses NVLink or peer access (NCCL_DEBUG=INFO, nvidia-smi topo -m), and /dev/shm"
    )
    yield Finding(
        check=check,
        value=f"{backend}, {world_size} ranks, right at every size: {shown}",
        verdict="warn" if slow else "ok",
        mend=mend if slow else "",
    )


def _timed(values: torch.Tensor, group: Any, device: torch.device) -> float:
    # All together first, so that the time is that of the sum and not of who came late.
    dist.barrier(group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    dist.all_reduce(values, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _slowest(seconds: torch.Tensor, device: torch.device, group: Any) -> float:
    moved = seconds.to(device, torch.float32)
    dist.all_reduce(moved, op=dist.ReduceOp.MAX, group=group)
    return float(moved)
