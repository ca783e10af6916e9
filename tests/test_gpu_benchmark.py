"""The GPU benchmark runs without a GPU, names what it left out, and tells what failed from what passed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trainer.data.annotations import read_annotation_file
from trainer.models.build import build_model
from trainer.recipe import ModelRecipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def beside() -> Iterator[None]:
    """Let the benchmark's modules find each other, as they do when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    return importlib.import_module("gpu_runs")


def measure(cwd: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    # From another directory: a benchmark finds the packages by itself.
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", *flags], cwd=cwd, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout.strip().splitlines()[-1])


def parts(report: dict[str, Any], section: str) -> dict[str, Any]:
    found: dict[str, Any] = report["sections"][section]["parts"]
    return found


def test_losses_are_compared_and_the_report_is_written(tmp_path: Path) -> None:
    flags = ("--sections", "correctness", "--variants", "bf16", "fsdp2", "--out", "gpu.json", "--markdown", "gpu.md")
    done, report = measure(tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    assert report["status"] == "ok"
    found = parts(report, "correctness")
    assert set(found) == {"fp32", "bf16", "fsdp2"}
    assert 0 < found["bf16"]["figures"]["largest_difference"] <= 2e-2
    assert found["fp32"]["figures"]["peak_bytes"] > 0
    assert "| bf16 |" in (tmp_path / "gpu.md").read_text()
    if not torch.cuda.is_available():
        assert parts(report, "machine")["what runs"]["status"] == "skipped"
        assert "No GPU" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_every_section_runs_and_what_needs_a_gpu_is_named(tmp_path: Path) -> None:
    done, report = measure(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["status"] for part in parts(report, "correctness").values()} == {"ok"}
    assert set(parts(report, "correctness")) == {"fp32", "bf16", "fp16", "zero2", "zero3", "zero2_offload", "fsdp2"}
    relief = parts(report, "relief")
    assert relief["cells halved"]["figures"]["shortages"] >= 1
    assert relief["activation checkpointing"]["status"] == relief["CPU offload"]["status"] == "skipped"
    throughput = parts(report, "throughput")
    for name in ("fp32", "bf16", "fp16"):
        ours, plain = (throughput[f"{way} {name}"]["figures"] for way in ("ours", "plain loop"))
        assert ours["over_plain_loop"] == pytest.approx(ours["clips_per_second"] / plain["clips_per_second"], rel=1e-2)
        assert ours["flops"] > 0
        assert ours["mfu"] is None
        assert 0 <= ours["data_wait_fraction"] <= 1
    assert throughput["student"]["status"] == "skipped"


def test_a_folder_with_files_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--folder", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "expected an empty folder" in done.stderr


def test_a_part_that_fails_fails_its_section_and_spares_the_others(runs: ModuleType) -> None:
    section = runs.Section(name="some", seconds=100.0)
    section.run("broken", lambda: {"never": 1 / 0})
    section.run("left out", lambda: skip(runs))
    assert section.run("right", lambda: {"figure": 1}).figures == {"figure": 1}
    assert [part.status for part in section.parts] == ["failed", "skipped", "ok"]
    assert "ZeroDivisionError" in section.parts[0].why
    assert section.parts[1].why == "not here"
    assert section.status == "failed"


def skip(runs: ModuleType) -> dict[str, Any]:
    raise runs.SkippedError("not here")


def test_a_run_that_hangs_is_ended_with_what_it_started(runs: ModuleType, tmp_path: Path) -> None:
    runner = runs.Runner(folder=tmp_path, on_gpu=False)
    section = runs.Section(name="short", seconds=3.0)
    begin = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    script = f"import subprocess, sys; {begin}; print('begun', child.pid, flush=True); child.wait()"
    part = section.run("hangs", lambda: {"said": runner.python(["-c", script], section)})
    assert part.status == "failed"
    assert "still running when the 3 s" in part.why
    assert "begun" in part.why
    # No time is left for another one, and it is not passed over in silence.
    assert "were used up" in section.run("next", lambda: {"left": section.left()}).why
    assert is_gone(int(part.why.split()[-1]))


def is_gone(process: int) -> bool:
    """Tell whether a process that was just killed has ended; dead and not yet taken note of counts."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_losses_that_differ_or_are_no_number_fail(runs: ModuleType) -> None:
    compare = importlib.import_module("gpu_correctness").compare
    reference = trained(runs, [4.0, 2.0])
    assert compare(trained(runs, [4.0, 2.0002]), reference, 1e-3)["largest_difference"] == pytest.approx(1e-4)
    assert compare(trained(runs, [None, 2.0]), reference, 1e-3)["skipped_steps"] == 1
    for losses in ([4.0, 2.1], [4.0, float("nan")], [4.0], [None, None]):
        with pytest.raises(runs.FailedError):
            compare(trained(runs, losses), reference, 1e-3)


def test_a_run_under_another_backend_than_asked_for_fails(runs: ModuleType) -> None:
    check_backend = importlib.import_module("gpu_correctness").check_backend
    check_backend(trained(runs, [4.0]), "replicated")
    with pytest.raises(runs.FailedError, match="expected to run under zero2, found replicated"):
        check_backend(trained(runs, [4.0]), "zero2")


def trained(runs: ModuleType, losses: list[float | None]) -> Any:
    return runs.Trained(losses=losses, waits=[], steps=[{"backend": "replicated"}], events=[], output="")


def test_long_clips_are_a_corpus_that_fits_ctc(tmp_path: Path) -> None:
    corpus = importlib.import_module("gpu_relief").write_long_clips(tmp_path / "long", frames=100)
    for split in ("train", "dev"):
        rows = read_annotation_file(corpus / "annotations" / f"{split}.corpus.csv")
        assert len(rows) == 8
        assert all((corpus / split / f"{row.id}.npz").is_file() for row in rows)


def test_peaks_are_found_by_name_and_unknown_devices_have_none() -> None:
    peak_flops = importlib.import_module("gpu_throughput").peak_flops
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_flops("NVIDIA L40S", "fp32") == 91.6e12
    assert peak_flops("NVIDIA L40", "fp32") is None
    assert peak_flops("cpu", "fp32") is None


def test_operations_are_those_of_the_weights() -> None:
    flops = importlib.import_module("gpu_machine").flops
    counted = flops("64", "20", "0.02", "12", "1")
    model = build_model(ModelRecipe(width=0.02, rnn_size=12, rnn_layers=1), feature_dim=64, num_classes=20)
    assert counted["parameters"] == sum(p.numel() for p in model.parameters())
    # The head sees every fourth frame: two operations a weight forward, four backward.
    head = 6 * sum(p.numel() for p in model.head.parameters() if p.ndim == 2) / 4
    assert head < counted["flops_per_frame"] < 6 * counted["parameters"]
