"""Verdicts: whose fault a finding is. Nothing here needs torch or another process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launch.doctor import format_findings
from launch.preflight import judge
from trainer.doctor.facts import NodeFacts, count_devices, hash_code
from trainer.doctor.finding import Finding, guarded, join_alike
from trainer.doctor.judging import judge_absent
from trainer.doctor.network import rounds
from trainer.doctor.rank_stage import RANKS, Stage, judge_ranks
from trainer.doctor.verdicts import check_clocks, check_limits, check_lines, check_same, check_speeds, check_versions
from trainer.errors import InputError

FACTS = NodeFacts(
    node="node1",
    index=0,
    host="node1",
    python="3.11.7",
    versions={"torch": "2.13.0", "deepspeed": None},
    code="abc",
    driver="550.54",
    devices=4,
    shared_memory=1 << 34,
    open_files=4096,
    cpus=8,
    memory=1 << 36,
)


def nodes(*changes: dict[str, object]) -> list[NodeFacts]:
    """Nodes node1, node2, … that differ from the first in what is named."""
    return [
        dataclasses.replace(FACTS, node=f"node{index}", index=index - 1, **change)
        for index, change in enumerate(changes, 1)
    ]


def failures(findings: list[Finding]) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.check, one.nodes) for one in findings if one.verdict == "FAIL"]


def test_the_node_that_differs_from_most_is_at_fault() -> None:
    assert not failures(list(check_versions(nodes({}, {}, {}))))
    odd = nodes({}, {"versions": {"torch": "2.12.1", "deepspeed": None}}, {})
    assert failures(list(check_versions(odd))) == [("torch", ("node2",))]
    missing = nodes({}, {"versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "driver": "535.1"}, {})
    assert failures(list(check_versions(missing))) == [("deepspeed", ("node2",)), ("driver", ("node2",))]
    [torch] = [one for one in check_versions(odd) if one.check == "torch"]
    assert "2.12.1 on node2" in torch.value
    assert "2.13.0 on node1, node3" in torch.value
    assert torch.mend


@pytest.mark.parametrize("changes", [({}, {"code": "abd"}), ({}, {"code": "x"}, {"code": "x"}, {})])
def test_where_as_many_say_the_one_as_the_other_nobody_is_at_fault(changes: tuple[dict[str, object], ...]) -> None:
    """To exclude one of them could exclude the good one, and the job would come back to the bad one."""
    found = list(check_versions(nodes(*changes)))
    assert failures(found) == [("code", ())]
    verdict = judge(found, [f"node{number}" for number in range(1, len(changes) + 1)])
    assert (verdict["ok"], verdict["bad_nodes"]) == (False, [])
    assert "code: abc on node1" in verdict["problems"][0]


def test_one_value_in_all_places_is_right() -> None:
    found = check_same("driver", dict.fromkeys("abc", "550"), mend="…")
    assert (found.verdict, found.value) == ("ok", "550 on all 3 nodes")


def test_limits_name_the_node_that_is_short() -> None:
    assert not failures(list(check_limits(nodes({}, {}), 4)))
    assert failures(list(check_limits(nodes({}, {"shared_memory": 60 << 20}), 4))) == [("shared memory", ("node2",))]
    # Enough for one rank, and less than anybody would choose.
    assert [one.verdict for one in check_limits(nodes({"shared_memory": 60 << 20}), 1)] == ["warn", "ok"]
    assert failures(list(check_limits(nodes({"shared_memory": None}), 1))) == [("shared memory", ("node1",))]
    assert failures(list(check_limits(nodes({}, {"open_files": 100}), 1))) == [("open files", ("node2",))]
    assert [one.verdict for one in check_limits(nodes({"open_files": 512}), 1)] == ["ok", "warn"]


@pytest.mark.parametrize(("skew", "verdict"), [(0.2, "ok"), (-3.0, "warn"), (-70.0, "FAIL")])
def test_clocks(skew: float, verdict: str) -> None:
    [found] = check_clocks({"node2": 0.01, "node3": skew})
    assert found.verdict == verdict
    assert found.nodes == (("node3",) if verdict == "FAIL" else ())


def test_slow_is_below_half_of_the_median() -> None:
    def slow(**speeds: float) -> tuple[str, ...]:
        return check_speeds("compute", speeds, show=str, mend="…").nodes

    assert slow(a=100, b=51, c=100) == ()
    assert slow(a=100, b=49, c=100) == ("b",)
    # Of two the quicker one is the measure: half of their mean no node is below.
    assert slow(a=100, b=49) == ("b",)
    assert slow(a=100) == ()
    assert slow(a=10, b=10, c=100) == ()


def test_a_slow_neighbour_makes_nobody_slow() -> None:
    [found] = check_lines([("a", "b", 1e9), ("a", "c", 2e6), ("b", "c", 3e6)], leader="a")
    assert (found.verdict, found.nodes) == ("FAIL", ("c",))
    [found] = check_lines([("a", "b", 1e9), ("c", "d", 1e9), ("a", "c", 9e8)], leader="a")
    assert found.verdict == "ok"
    # Quick enough by itself, and below half of the others: worth a word.
    [found] = check_lines([("a", "b", 4e8), ("a", "c", 1.8e8), ("b", "c", 1.7e8)], leader="a")
    assert (found.verdict, found.nodes) == ("warn", ())
    [found] = check_lines([("a", "b", 1e10), ("a", "c", 1e9), ("b", "c", 1e9)], leader="a")
    assert (found.verdict, found.nodes) == ("FAIL", ("c",))
    # All alike and slow: worth a word, and nobody's fault.
    [found] = check_lines([("a", "b", 1e7)], leader="a")
    assert (found.verdict, found.nodes) == ("warn", ())


def test_a_node_without_lines_is_lost_and_the_leader_never() -> None:
    found = list(check_lines([("a", "b", None), ("a", "c", 1e9), ("b", "c", None)], leader="a"))
    assert {one.nodes for one in found if one.verdict == "FAIL"} == {("b",)}
    found = list(check_lines([("a", "b", None)], leader="a"))
    assert [one.nodes for one in found] == [("b",)]
    # Each has other lines: the pair is named, with one of them to leave out.
    found = list(check_lines([("a", "b", 1e9), ("a", "c", 1e9), ("b", "c", None)], leader="a"))
    assert [(one.verdict, one.nodes) for one in found] == [("FAIL", ("b",)), ("ok", ())]
    assert "b and c" in found[0].value


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 64])
def test_rounds_pair_every_node_with_several_others(count: int) -> None:
    seen: set[frozenset[int]] = set()
    met = dict.fromkeys(range(count), 0)
    for pairs in rounds(range(count)):
        ones = [node for pair in pairs for node in pair]
        assert len(ones) == len(set(ones))
        seen |= {frozenset(pair) for pair in pairs}
        for node in ones:
            met[node] += 1
    assert len(seen) == sum(met.values()) // 2
    assert min(met.values()) >= min(2, count - 1)
    assert max(met.values()) <= 3


def test_a_check_that_breaks_is_a_finding_and_hides_no_other() -> None:
    def breaks() -> list[Finding]:
        raise ZeroDivisionError("by zero")

    [found] = guarded("corpus", breaks, node="node2")
    assert (found.check, found.verdict, found.nodes) == ("corpus", "FAIL", ("node2",))
    assert "ZeroDivisionError: by zero (test_verdicts.py:" in found.value

    def refuses() -> list[Finding]:
        raise InputError(["a.npz: is cut short; extract it anew", "b.npz: holds NaN; extract it anew"])

    found, other = guarded("corpus", refuses)
    assert (found.value, found.mend, found.verdict) == ("a.npz: is cut short", "extract it anew", "FAIL")
    assert other.value == "b.npz: holds NaN"

    def half_way() -> object:
        yield Finding(check="corpus", value="read")
        raise OSError("gone")

    assert [one.verdict for one in guarded("corpus", half_way)] == ["ok", "FAIL"]


def test_findings_survive_json_and_fit_the_table() -> None:
    long = Finding(check="network", value="word " * 60, verdict="FAIL", mend="mend " * 20, nodes=("node2",))
    assert Finding.from_json(json.loads(json.dumps(long.to_json()))) == long
    table = format_findings({"findings": [long.to_json(), Finding(check="clocks", value="x").to_json()]}, width=100)
    assert max(map(len, table.splitlines())) <= 100
    assert table.count("word") == 60
    assert table.splitlines()[0].split() == ["check", "value", "verdict", "mend"]
    assert table.endswith("1 FAIL, 1 ok")


def test_what_is_right_on_many_nodes_is_one_line() -> None:
    right = [Finding(check="free disk", value=f"node{i}: 1 TB", nodes=(f"node{i}",)) for i in range(4)]
    bad = dataclasses.replace(right[2], verdict="FAIL", value="node2: full")
    joined = join_alike([*right[:2], bad, right[3]])
    assert [one.value for one in joined] == ["node0: 1 TB (and 2 more)", "node2: full"]


def test_absent_nodes_are_named() -> None:
    [found] = judge_absent({0: "node1", 2: "node3"}, ("node1", "node2", "node3"), 3, Path("/run"), 5)
    assert (found.verdict, found.nodes) == ("FAIL", ("node2",))
    [found] = judge_absent({0: "node1", 1: "node2"}, (), 2, Path("/run"), 5)
    assert found.verdict == "ok"


def test_preflight_excludes_nodes_and_never_all_for_what_is_no_nodes_fault() -> None:
    def verdict(names: list[str], *found: tuple[str, tuple[str, ...]]) -> tuple[bool, list[str]]:
        made = judge([Finding(check=check, value="…", verdict="FAIL", nodes=at) for check, at in found], names)
        assert len(made["problems"]) == len(found)
        return made["ok"], made["bad_nodes"]

    two = ["node1", "node2"]
    assert verdict(two) == (True, [])
    assert verdict(two, ("network", ("node2",)), ("shared memory", ("node2",))) == (False, ["node2"])
    # The run's disk is full for all of them: another node would not help.
    assert verdict(two, ("free disk", ("node1",)), ("free disk", ("node2",))) == (False, [])
    assert verdict(["node1"], ("free disk", ("node1",))) == (False, [])
    assert verdict(["node1"], ("shared memory", ("node1",))) == (False, ["node1"])
    assert verdict(two, ("versions", ())) == (False, [])


def test_ranks_that_came_less_far_are_those_the_others_waited_for(tmp_path: Path) -> None:
    stage = Stage(
        members=[0, 2],
        ranks_per_node=2,
        config="",
        cpu=True,
        address=None,
        port=1,
        limit=1.0,
        recipe=None,
        interpreter="python",
    )
    for rank, phase in enumerate(("all-reduce", "all-reduce", "all-reduce", "joining the process group")):
        told = {"number": 5 if phase == "all-reduce" else 4, "phase": phase, "since": 0.0}
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(told))
    for node in (0, 2):
        told = {"code": -9, "reason": "not done within 1 s", "tail": ""}
        (tmp_path / f"ended-{node}.json").write_text(json.dumps(told))
    [found] = judge_ranks(stage, tmp_path, {0: "node1", 2: "node3"})
    assert (found.verdict, found.nodes) == ("FAIL", ("node3",))
    assert "rank 3 of 4 ended or hung while joining the process group" in found.value
    # A node whose ranks failed by themselves is the reason, wherever the others were.
    told = {"code": 1, "reason": "", "tail": "ImportError: libcuda.so"}
    (tmp_path / "ended-0.json").write_text(json.dumps(told))
    [found] = judge_ranks(stage, tmp_path, {0: "node1", 2: "node3"})
    assert found.nodes == ("node1",)
    assert "libcuda.so" in found.value
    # What was found before is not lost.
    told = {"done": False, "findings": [Finding(check="all-reduce", value="right").to_json()]}
    (tmp_path / RANKS).write_text(json.dumps(told))
    found = judge_ranks(stage, tmp_path, {0: "node1", 2: "node3"})
    assert [(one.check, one.verdict) for one in found] == [("all-reduce", "ok"), ("ranks", "FAIL")]
    (tmp_path / RANKS).write_text(json.dumps(told | {"done": True}))
    found = judge_ranks(stage, tmp_path, {0: "node1", 2: "node3"})
    assert [(one.check, one.verdict) for one in found] == [("ranks", "ok"), ("all-reduce", "ok")]


def test_devices_are_counted_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert count_devices(tmp_path) == 3
    for visible, count in (("0,1", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("0,1,2,3", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_devices(tmp_path) == count


def test_code_that_differs_shows(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "launch").mkdir()
    (tmp_path / "trainer" / "a.py").write_text("x = 1\n")
    before = hash_code(tmp_path)
    assert hash_code(tmp_path) == before
    (tmp_path / "trainer" / "a.py").write_text("x = 2\n")
    assert hash_code(tmp_path) != before
