"""What cannot run is refused before the first step, by one message for all ranks, and nothing is written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment, train
from tests.distributed.backends import run

STEP = ["--max_steps", "1", "--evaluate_every", "99"]


def refusal(
    corpus: Path, out: Path, *flags: str, module: str = "trainer.train", extra: dict[str, str] | None = None
) -> str:
    """Launch two ranks that must not train; return what they say."""
    done = run("replicated", 2, corpus, out, *STEP, *flags, module=module, extra=extra, check=False)
    assert done.returncode != 0
    assert not out.exists()
    # The launcher adds its own report, which begins with the exit codes.
    said, _, report = done.stderr.partition("failed (exitcode:")
    assert report.startswith(" 2)"), done.stderr
    assert "Traceback" not in said
    assert done.stderr.count("error: ") == 1
    return said


def deepspeed(path: Path | str, **extra: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), **extra}


def without_tools(folder: Path) -> dict[str, str]:
    """An environment in which no compiler is found, nor anything that one has built before."""
    (folder / "empty").mkdir()
    return {"PATH": str(folder / "empty"), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}


def test_a_configuration_that_contradicts_the_flags_and_one_with_typing_errors(corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    zero = {"stage": 2, "overlap_com": True, "offload_optimizer": {"device": "cpu", "pin_memroy": True}}
    content: dict[str, Any] = {"gradient_clipping": 0.3, "bf16": {"enabled": True}, "zero_optimization": zero}
    config.write_text(json.dumps(content))
    extra = deepspeed(config, ACCELERATE_MIXED_PRECISION="bf16")
    said = refusal(corpus, tmp_path / "run", "--gradient_clip", "1", extra=extra)
    for message in (
        "mixed_precision: the launch configuration says bf16, the recipe no",
        f"{config}: gradient_clipping: the file says 0.3, the recipe 1",
        f"{config}: bf16: remove it",
        f"{config}: zero_optimization.overlap_com: unknown key; did you mean overlap_comm?",
        f"{config}: zero_optimization.offload_optimizer.pin_memroy: unknown key; did you mean pin_memory?",
    ):
        assert said.count(message) == 1


def test_offload_to_a_disk_without_a_compiler_names_what_is_missing(corpus: Path, tmp_path: Path) -> None:
    extra = deepspeed("ds_configs/zero3_nvme.json", **without_tools(tmp_path))
    said = refusal(corpus, tmp_path / "run", extra=extra)
    assert f"{ROOT / 'ds_configs' / 'zero3_nvme.json'}: device nvme: " in said
    for tool in ("no ninja", "no C++ compiler"):
        assert tool in said
    assert '"device": "cpu"' in said


def test_a_precision_that_one_rank_cannot_compute_in(corpus: Path, tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("precision_worker.py"))
    said = refusal(corpus, tmp_path / "run", "--mixed_precision", "fp16", module=worker)
    assert "mixed_precision: this cpu cannot compute in fp16" in said
    assert "use --mixed_precision no" in said


def test_an_address_space_in_which_libraries_would_break(corpus: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "trainer.train", "--data_dir", str(corpus), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        launch,
        env=environment() | {"ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ulimit -v (RLIMIT_AS): this process may use 900 MB of address space")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def donor(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("donor") / "run"
    train(1, corpus, out, *STEP)
    return out


def test_weights_of_another_model_size(corpus: Path, donor: Path, tmp_path: Path) -> None:
    said = refusal(corpus, tmp_path / "run", "--init_from", str(donor), "--rnn_size", "20")
    assert str(donor) in said
    assert "instead of" in said
    assert "use the model options it was trained with" in said


def test_a_run_of_another_model_size(corpus: Path, donor: Path, tmp_path: Path) -> None:
    said = refusal(corpus, tmp_path / "run", "--resume", str(donor), "--rnn_size", "20")
    assert "rnn_size is 12 there and 20 now" in said


@pytest.mark.slow
def test_offload_to_the_host_needs_no_compiler(corpus: Path, tmp_path: Path) -> None:
    """The optimizer is torch's own there, so that this is no error."""
    done = run("zero2_offload", 2, corpus, tmp_path / "run", *STEP, extra=without_tools(tmp_path))
    assert "finished at step 1" in done.stdout
    assert not (tmp_path / "extensions").exists()
