"""What is asked of SLURM, as far as no SLURM is needed."""

from __future__ import annotations

import pytest

from launch.slurm.control import with_excluded


@pytest.mark.parametrize(
    ("already", "nodes", "united"),
    [
        ("(null)", (), ()),
        ("(null)", ("node2",), ("node2",)),
        ("node[3,7-9]", (), ("node[3,7-9]",)),
        ("node[3,7-9]", ("node2", "node4"), ("node[3,7-9]", "node2", "node4")),
    ],
)
def test_nodes_are_excluded_beside_those_that_were(
    already: str, nodes: tuple[str, ...], united: tuple[str, ...]
) -> None:
    assert with_excluded({"ExcNodeList": already}, nodes) == united
