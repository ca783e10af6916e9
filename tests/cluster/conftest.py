"""Clusters for tests: skipped where none can be made, unless CLUSTER_TESTS=required."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing


@pytest.fixture(scope="session")
def can_cluster() -> None:
    """Skip, or fail where a cluster is required."""
    if reason := missing():
        if os.environ.get("CLUSTER_TESTS") == "required":
            pytest.fail(f"CLUSTER_TESTS=required, but {reason}")
        pytest.skip(f"no cluster: {reason}")


@pytest.fixture
def cluster(can_cluster: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of this test's own, whose nodes may be killed.

    Two nodes, or `@pytest.mark.parametrize("cluster", [{"nodes": 3}], indirect=True)` with `Cluster`'s options.
    """
    with Cluster(tmp_path / "cluster", **getattr(request, "param", {})) as started:
        yield started


@pytest.fixture(scope="session")
def shared_cluster(can_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes for tests that submit jobs and leave the nodes alone; other jobs may run beside theirs."""
    with Cluster(tmp_path_factory.mktemp("shared") / "cluster") as started:
        yield started
