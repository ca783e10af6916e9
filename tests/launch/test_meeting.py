"""How nodes find one another, as far as one machine can show; tests/cluster shows the rest."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from launch.slurm.environment import attempt_name, clean, ports
from launch.slurm.meeting import Meeting, UnfitError, compare_versions, describe_versions, meet
from launch.slurm.network import address_towards, interface_of, is_free
from trainer.errors import InputError
from trainer.job.directory import JobDirectory


def test_attempts_have_ports_of_their_own() -> None:
    one, other = list(ports("4711.0")), list(ports("4711.1"))
    assert one == list(ports("4711.0"))
    assert one != other
    assert len(set(one)) == len(one)
    assert all(20000 <= port < 32000 for port in one)


def test_an_attempt_is_named_by_job_task_and_restarts() -> None:
    assert attempt_name({"SLURM_JOB_ID": "12"}) == "12.0"
    task = {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert attempt_name(task) == "12_3.2"


def test_a_new_job_inherits_nothing_of_the_one_it_is_submitted_from() -> None:
    mine = {"HOME": "/home/me", "WANDB_API_KEY": "k", "SLURM_CONF": "/etc/x", "MASTERY": "yes", "WORLD": "all"}
    job = {"SLURM_JOB_ID": "1", "SBATCH_EXPORT": "NONE", "PMIX_RANK": "0", "PMI_FD": "3", "OMPI_COMM_WORLD_SIZE": "2"}
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "SIGNSCALE_JOB": "/r", "PYTHONPATH": "/old"}
    assert clean(mine | job | ranks) == mine


def test_a_taken_port_is_seen() -> None:
    with socket.create_server(("", 0)) as server:
        assert not is_free(server.getsockname()[1])


def test_the_interface_is_the_one_that_the_route_takes() -> None:
    assert interface_of(address_towards("127.0.0.1")) == "lo"
    with pytest.raises(InputError, match=r"no network interface has the address 192\.0\.2\.1"):
        interface_of("192.0.2.1")


def test_nodes_with_other_versions_are_named_with_both() -> None:
    head = {"host": "a", "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": None}}
    same = {"host": "b", "versions": dict(head["versions"])}  # type: ignore[call-overload]
    other = {"host": "c", "versions": {"python": "3.11.9", "torch": "2.13.0", "deepspeed": "0.19"}}
    assert compare_versions([head, same]) == []
    first, second = compare_versions([head, same, other])
    assert first.startswith("c has python 3.11.9, a has 3.11.7;")
    assert second.startswith("c has deepspeed 0.19, a has None;")
    assert {"python", "torch", "accelerate", "signscale"} <= describe_versions().keys()


def test_all_nodes_agree_on_one_place_and_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNSCALE_HOSTS", "127.0.0.1,localhost,localhost")
    job, met = JobDirectory.of(tmp_path), {}  # type: ignore[var-annotated]

    def arrive(node: int) -> None:
        met[node] = meet(job, "1.0", node=node, nodes=3, seconds=60)

    nodes = [threading.Thread(target=arrive, args=(node,)) for node in (2, 1, 0)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
    assert isinstance(met[0], Meeting)
    assert len({(one.address, one.port, one.token) for one in met.values()}) == 1
    assert {one.interface for one in met.values()} == {"lo"}
    assert met[0].port in list(ports("1.0"))
    assert sorted(one.node for one in met.values()) == [0, 1, 2]


def test_who_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNSCALE_HOSTS", "n1,n2,n3")
    with pytest.raises(InputError, match="n2, n3 did not come in time") as late:
        meet(JobDirectory.of(tmp_path), "1.0", node=0, nodes=3, seconds=0.3)
    # They may come to the next attempt, which an unfit one never can.
    assert not isinstance(late.value, UnfitError)
    noted = tmp_path / "noted"
    noted.mkdir()
    (noted / "unfit.n3").write_text("n3 has no /x/python\n")
    with pytest.raises(UnfitError, match="n3 has no /x/python; check --interpreter"):
        meet(JobDirectory.of(tmp_path), "1.1", node=0, nodes=3, seconds=60, unfit=noted)
