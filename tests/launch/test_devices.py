"""How many ranks a machine gets, and which of accelerate's configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.jobs.options import LocalOptions
from launch.local import choose_devices
from trainer.errors import InputError


def test_the_configuration_fits_the_devices() -> None:
    def choose(*, processes: int = 0, named: str = "") -> tuple[int, str]:
        ranks, use_cpu, config = choose_devices(LocalOptions(processes=processes, cpu=True), named)
        assert use_cpu
        return ranks, Path(config).stem

    assert choose() == (1, "debug_cpu")
    assert choose(processes=3) == (3, "multi_cpu")
    assert choose(processes=2, named="fsdp2") == (2, "fsdp2")
    with pytest.raises(InputError, match="there is no such file"):
        choose(named="fsdp3")


@pytest.mark.parametrize(
    ("gpus", "processes", "expected"),
    [(1, 0, (1, "single_gpu")), (4, 0, (4, "multi_gpu")), (4, 2, (2, "multi_gpu")), (4, 1, (1, "single_gpu"))],
)
def test_gpus_get_a_rank_each(
    gpus: int, processes: int, expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.count_gpus", lambda: gpus)
    ranks, use_cpu, config = choose_devices(LocalOptions(processes=processes), "")
    assert (ranks, Path(config).stem) == expected
    assert not use_cpu
    with pytest.raises(InputError, match="each rank needs one; lower it, or add --cpu"):
        choose_devices(LocalOptions(processes=gpus + 1), "")
