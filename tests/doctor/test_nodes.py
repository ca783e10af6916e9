"""Nodes meet, measure and report; one that differs, hangs or never comes is named and holds nobody up. No torch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import ROOT, environment
from trainer.doctor.finding import Finding
from trainer.doctor.network import Line, Listener, Peer, UnreachableError
from trainer.doctor.node import FINDINGS, Options
from trainer.doctor.storage import check_storage

TOKEN = "of this test"


def start_node(report: Path, index: int, *, packages: Path | None = None) -> subprocess.Popen[str]:
    """Start a node's process, as srun would."""
    paths = [str(ROOT)] if packages is None else [str(packages), str(ROOT)]
    env = environment() | {
        "SLURM_NODEID": str(index),
        "SLURMD_NODENAME": f"node{index + 1}",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", "trainer.doctor.node", str(report)]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def examine(report: Path, options: Options, nodes: Sequence[int], **packages: Path) -> list[Finding]:
    """Start nodes 0, 1, … and return what they found."""
    report.mkdir()
    options.write(report)
    processes = [start_node(report, index, packages=packages.get(f"node{index}")) for index in nodes]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads((report / FINDINGS).read_text())
    findings = [Finding.from_json(one) for one in found["findings"]]
    assert found["ok"] == all(one.verdict != "FAIL" for one in findings)
    return findings


def named(findings: Sequence[Finding], check: str) -> Finding:
    [found] = [one for one in findings if one.check == check]
    return found


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(run=str(tmp_path / "run"), token=TOKEN, nodes=2, ranks=False)


def test_two_nodes_agree_and_leave_nothing_behind(tmp_path: Path, options: Options) -> None:
    found = examine(tmp_path / "report", options, [0, 1])
    assert {one.verdict for one in found} <= {"ok", "warn"}
    assert named(found, "nodes").value == "2: node1, node2"
    assert "MB/s" in named(found, "network").value or "GB/s" in named(found, "network").value
    assert named(found, "clocks").verdict == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_another_version_on_one_node_is_found_by_that_nodes_own_environment(tmp_path: Path, options: Options) -> None:
    installed = tmp_path / "packages" / "accelerate-0.1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 0.1\n")
    found = examine(tmp_path / "report", options, [0, 1], node1=installed.parent)
    version = named(found, "accelerate")
    # Of two that differ nobody knows which one is right.
    assert (version.verdict, version.nodes) == ("FAIL", ())
    assert "0.1 on node2" in version.value


def test_a_node_that_never_comes_is_named_and_the_others_go_on(tmp_path: Path, options: Options) -> None:
    names = ("node1", "node2", "node3")
    three = dataclasses.replace(options, nodes=3, names=names, patience=12.0)
    found = examine(tmp_path / "report", three, [0, 2])
    absent = named(found, "nodes")
    assert (absent.verdict, absent.nodes) == ("FAIL", ("node2",))
    assert named(found, "network").verdict in ("ok", "warn")


def test_lines_tell_time_and_speed_to_those_who_know_the_token() -> None:
    with closing(Listener(3, TOKEN, 1)) as listener:
        peer = Peer(index=3, node="node4", hosts=("name-of-nobody.invalid", "127.0.0.1"), port=listener.port)
        line = Line(peer, TOKEN)
        assert not line.by_name
        assert abs(line.clock_offset()) < 1.0
        assert line.bandwidth() > 1e6
        with pytest.raises(UnreachableError, match=r"node4 port .*name-of-nobody"):
            Line(peer, "of another examination")
        # Another node at that address, as container bridges with one address everywhere have it.
        with pytest.raises(UnreachableError, match="node 3 answers there"):
            Line(dataclasses.replace(peer, index=2), TOKEN)


def test_who_does_not_come_is_waited_for_once() -> None:
    with closing(Listener(0, TOKEN, 2)) as listener:
        started = time.monotonic()
        assert not listener.meet("round 0", 0, 0.2)
        assert time.monotonic() - started < 30
        line = Line(Peer(index=0, node="node1", hosts=("127.0.0.1",), port=listener.port), TOKEN)
        answers: list[bool] = []
        other = Thread(target=lambda: answers.append(line.meet("round 1", 1, 60)))
        other.start()
        assert listener.meet("round 1", 0, 60)
        other.join(60)
        assert answers == [True]


def test_storage_writes_nothing_that_stays(tmp_path: Path) -> None:
    assert {one.verdict for one in check_storage(tmp_path / "a" / "run", "node1")} == {"ok"}
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    [found] = check_storage(tmp_path / "file", "node1")
    assert (found.verdict, found.nodes) == ("FAIL", ("node1",))
    huge = list(check_storage(tmp_path, "node1", needed=1 << 60))
    assert [one.verdict for one in huge] == ["ok", "FAIL"]


def test_a_full_disk_fails(tmp_path: Path) -> None:
    # A mount of this process alone; it goes with it.
    script = (
        f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c 'import sys\n"
        "from pathlib import Path\nfrom trainer.doctor.storage import check_storage\n"
        'for one in check_storage(Path(sys.argv[1]), "node1"): print(one.check, one.verdict, one.value, sep="|")\n'
        "print(list(Path(sys.argv[1]).iterdir()))' "
        f"{tmp_path}"
    )
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    directory, space, left = done.stdout.splitlines()
    assert directory.startswith("run directory|FAIL")
    assert "No space left" in directory
    assert space.startswith("free disk|FAIL")
    assert left == "[]"
