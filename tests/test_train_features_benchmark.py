"""The benchmark of training end to end runs, says what it lacks, and its ways train the same model on the same loss."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from trainer.data.batch import Labels
from trainer.layout import lay_out
from trainer.models.build import build_model
from trainer.objectives.ctc import ctc_objective

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train_features.py"
FLAGS = ("--quick", "--clips", "30", "--feature_dim", "32", "--rounds", "1", "--steps", "2", "--warmup", "1")
TURNS = ("--workers", "0", "--teacher_steps", "1", "--teacher_warmup", "1")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The script as a module, with what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("train_features")


@pytest.fixture(scope="module")
def usual(benchmark: ModuleType) -> ModuleType:
    """What the script compares with."""
    return importlib.import_module("usual_training")


@pytest.fixture(scope="module")
def clips(benchmark: ModuleType, usual: ModuleType, written: Namespace) -> Dataset[Any]:
    """The corpus as the usual dataset reads it."""
    corpora = benchmark.corpora_of(written)
    dataset: Dataset[Any] = usual.NpzClips(corpora.npz, benchmark.normalization_of(corpora))
    return dataset


@pytest.fixture(scope="module")
def written(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    """The benchmark's arguments, with both corpora in their folder."""
    folder = tmp_path_factory.mktemp("train_features")
    args: Namespace = benchmark.parse_args([*FLAGS, "--folder", str(folder)])
    benchmark.write_corpora(args)
    return args


def test_every_way_that_can_run_does(written: Namespace) -> None:
    # From another directory: a benchmark finds the packages by itself.
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *FLAGS, *TURNS, "--folder", str(written.folder)],
        cwd=written.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    installed = [name for name in ("accelerate", "lightning") if importlib.util.find_spec(name)]
    for name in ("accelerate", "lightning"):
        if name in installed:
            ratio = figures["clips_per_second_ours"] / figures[f"clips_per_second_{name}_0"]
            assert figures[f"over_{name}"] == pytest.approx(ratio, rel=1e-2)
        else:
            assert figures[f"over_{name}"] is None
            assert f"{name} is not installed" in finished.stdout
    assert figures["missing"] == [name for name in ("accelerate", "lightning") if name not in installed]
    assert 0.0 <= figures["data_wait_fraction"] <= 1.0


def test_the_padded_module_computes_the_trainer_s_loss(
    benchmark: ModuleType, usual: ModuleType, written: Namespace, clips: Any
) -> None:
    recipe = benchmark.make_recipe(written)
    torch.manual_seed(0)
    padded = usual.PaddedTeacher(recipe, clips).eval()
    torch.manual_seed(0)
    teacher = build_model(recipe.model, feature_dim=written.feature_dim, num_classes=len(clips.class_of) + 1)
    # Clips of one length, so that nothing is padded, and no dropout, whose draws differ.
    chosen = [clips[index] for index in range(4)]
    shortest = min(len(clip.features) for clip in chosen)
    chosen = [clip._replace(features=clip.features[:shortest]) for clip in chosen]
    for module in (*padded.modules(), *teacher.modules()):
        if hasattr(module, "p"):
            module.p = 0.0
    batch = usual.pad(chosen)
    theirs = usual.padded_loss(padded(batch["features"]), batch)

    glosses = np.array([len(clip.classes) for clip in chosen])
    labels = Labels(
        classes=torch.cat([clip.classes for clip in chosen]),
        lengths=torch.from_numpy(glosses),
        weights=torch.from_numpy(1.0 / glosses).float(),
    )
    layout = lay_out(np.full(4, shortest), teacher.total_stride)
    logits = teacher(torch.cat([clip.features for clip in chosen]), layout)
    ours = ctc_objective(logits, layout.output_lengths, labels) / 4
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


def test_the_usual_dataset_gives_normalised_clips(written: Namespace, clips: Any) -> None:
    features = torch.cat([clips[index].features for index in range(len(clips))])
    assert len(clips) == written.clips == 32
    assert features.mean(dim=0).abs().max() < 1e-3
    assert features.std(dim=0).max() == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(("flag", "asked", "found"), [("clips", "64", 32), ("feature_dim", "64", 32)])
def test_a_folder_with_another_corpus_is_refused(
    benchmark: ModuleType, written: Namespace, flag: str, asked: str, found: int
) -> None:
    args = benchmark.parse_args([*FLAGS, f"--{flag}", asked, "--folder", str(written.folder)])
    with pytest.raises(SystemExit, match=f"--{flag} {asked}: .* was written with {found}"):
        benchmark.write_corpora(args)
