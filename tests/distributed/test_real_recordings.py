"""On real recordings the small teacher reaches the published WER: 15 % or better on another session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, launch


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_small_teacher_on_two_ranks_reaches_the_wer_of_a_plain_model(coffee: Path, tmp_path: Path) -> None:
    flags = ["--config", str(ROOT / "configs" / "teacher_small.yaml"), "--data_dir", str(coffee), "--seed", "1"]
    launch(2, "trainer.train", [*flags, "--output_dir", str(tmp_path / "run")], timeout=1500)
    for split in ("test", "test_unseen"):
        launch(2, "trainer.evaluate", ["--checkpoint", str(tmp_path / "run"), "--split", split, "--max_wer", "15"])
    report = json.loads((tmp_path / "run" / "evaluation" / "test.json").read_text())
    assert report["clips"] == 64
