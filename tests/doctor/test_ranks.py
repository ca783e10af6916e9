"""What ranks find: values that are wrong, devices that differ, ranks that do not answer."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist

from trainer.doctor.collective import Reduced, check_all_reduce
from trainer.doctor.devices import RankFacts, check_compute, check_devices
from trainer.doctor.meeting import Meeting

RANK = RankFacts(
    rank=0,
    node="node1",
    torch="2.13.0",
    cuda="12.8",
    nccl="2.27.3",
    devices=2,
    device="H100",
    capability="9.0",
    memory=85_000_000_000,
    free=84_500_000_000,
)


def ranks(*changes: dict[str, object]) -> list[RankFacts]:
    """Two ranks a node."""
    return [
        dataclasses.replace(RANK, rank=rank, node=f"node{rank // 2 + 1}", **change)
        for rank, change in enumerate(changes)
    ]


def test_a_wrong_sum_names_the_nodes_that_have_it() -> None:
    right = [Reduced(bytes=4000, seconds=1e-4, wrong=0), Reduced(bytes=64_000_000, seconds=1e-2, wrong=0)]
    nodes = ["node1", "node1", "node2", "node2"]
    [found] = check_all_reduce([right] * 4, nodes, backend="nccl", on_cuda=True)
    assert found.verdict == "ok"
    assert "64 MB 10 ms (9.6 GB/s)" in found.value
    wrong = [right[0], dataclasses.replace(right[1], wrong=3)]
    [found] = check_all_reduce([right, right, right, wrong], nodes, backend="nccl", on_cuda=True)
    assert (found.verdict, found.nodes) == ("FAIL", ("node2",))
    [found] = check_all_reduce([wrong] * 4, nodes, backend="nccl", on_cuda=True)
    assert (found.verdict, found.nodes) == ("FAIL", ())


def test_gpus_that_talk_like_cpus_are_warned_of() -> None:
    slow = [Reduced(bytes=64_000_000, seconds=0.2, wrong=0)]
    [found] = check_all_reduce([slow] * 2, ["node1", "node1"], backend="nccl", on_cuda=True)
    assert (found.verdict, "NVLink" in found.mend) == ("warn", True)
    [found] = check_all_reduce([slow] * 2, ["node1", "node2"], backend="nccl", on_cuda=True)
    assert (found.verdict, "InfiniBand" in found.mend) == ("warn", True)
    [found] = check_all_reduce([slow] * 2, ["node1", "node2"], backend="gloo", on_cuda=False)
    assert found.verdict == "ok"


def test_devices_that_differ_are_their_nodes_fault() -> None:
    assert {one.verdict for one in check_devices(ranks({}, {}, {}, {}))} == {"ok"}
    other = {"device": "A100", "capability": "8.0"}
    found = {one.check: one for one in check_devices(ranks({}, {}, {}, {}, other, other))}
    assert (found["device"].verdict, found["device"].nodes) == ("FAIL", ("node3",))
    assert "A100" in found["device"].value
    found = {one.check: one for one in check_devices(ranks({}, {}, {"nccl": "2.21.5"}, {"nccl": "2.21.5"}, {}))}
    assert (found["torch build"].verdict, found["torch build"].nodes) == ("FAIL", ("node2",))
    # Somebody else's process on the device.
    found = {one.check: one for one in check_devices(ranks({}, {"free": 60_000_000_000}))}
    assert (found["device memory"].verdict, "rank 1" in found["device memory"].value) == ("warn", True)


def test_a_throttled_device_is_slow() -> None:
    found = check_compute(ranks({}, {}, {}, {}), [6e14, 6e14, 2e14, 6e14])
    assert (found.verdict, found.nodes) == ("FAIL", ("node2",))
    assert check_compute(ranks({}, {}), [6e14, 5e14]).verdict == "ok"


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_rank_that_does_not_answer_is_missed_and_not_waited_for_without_end(store: dist.Store) -> None:
    store.set("facts/2", '"late"')
    assert Meeting(store, 0, 3, seconds=0.3).exchange("facts", {"rank": 0}) == [{"rank": 0}, None, "late"]
    # Those that come later get the same answer.
    assert Meeting(store, 1, 3, seconds=0.3).exchange("facts", "too late") == [{"rank": 0}, None, "late"]
    assert Meeting(None, 0, 1, seconds=0.3).exchange("facts", (1, 2)) == [[1, 2]]
