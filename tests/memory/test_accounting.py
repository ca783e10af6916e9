"""How much memory a process may use and does use, on real processes with real limits."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from tests.conftest import ROOT, environment
from trainer.memory import accounting
from trainer.memory.accounting import PeakMeter, capacity, fragmentation, fragmentation_hint, is_limited

CPU = torch.device("cpu")
_LIMITED = """
import json, resource, torch
from trainer.memory.accounting import capacity, granted, in_use, is_limited
cpu = torch.device("cpu")
before = capacity(cpu)
size = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000, resource.RLIM_INFINITY))
left = capacity(cpu) - in_use(cpu)
fits = torch.empty(int(0.9 * left), dtype=torch.uint8) is not None
try:
    torch.empty(int(1.1 * left), dtype=torch.uint8)
    beyond = True
except RuntimeError:
    beyond = False
print(json.dumps([before > 10**9, is_limited(cpu), left, fits, beyond, granted(cpu) == size + 300_000_000]))
"""


def child(code: str, **variables: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_limit_of_address_space_is_what_can_be_allocated() -> None:
    roomy, limited, left, fits, beyond, as_granted = child(_LIMITED)
    assert roomy
    assert limited
    assert left == 300_000_000 or abs(int(str(left)) - 300_000_000) < 5_000_000
    assert fits
    assert not beyond
    assert as_granted


def test_ranks_of_a_node_share_its_memory() -> None:
    code = "import torch\nfrom trainer.memory.accounting import granted\nprint([granted(torch.device('cpu'))])"
    (whole,), (part,) = child(code), child(code, LOCAL_WORLD_SIZE="4")
    assert part == int(str(whole)) // 4


def test_a_cgroup_limit_counts(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "memory.max").write_text("1000000000\n")
    monkeypatch.setattr(accounting, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(accounting, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert capacity(CPU) == 500_000_000
    assert is_limited(CPU)
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "memory.max").write_text("600000000\n")
    assert capacity(CPU) == 300_000_000
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    assert capacity(CPU) == 500_000_000


def test_a_peak_is_seen_after_it_has_gone(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for resets in (True, False):
        if not resets:
            # Where the kernel's mark cannot be reset, a thread samples.
            monkeypatch.setattr(accounting, "_reset_high_water", lambda: False)
        with PeakMeter(CPU) as meter:
            block = torch.ones(40_000_000)
            block.add_(1.0)
            del block
        assert 150e6 < meter.beyond_start < 200e6
        with PeakMeter(CPU) as meter:
            torch.ones(1000)
        assert meter.beyond_start < 20e6


def test_fragmentation_is_hinted_at_once_it_matters() -> None:
    assert fragmentation(CPU) is None
    assert fragmentation_hint(0.1, {}) == ""
    assert "expandable_segments:True" in fragmentation_hint(0.5, {})
    assert fragmentation_hint(0.5, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}) == ""
