"""An online teacher sees what its student sees: in one process, tensor by tensor, for features and for video."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer.distillation as distilling
from tests.conftest import TINY, reset_process
from tests.publishing import publish
from tests.videos import synthesize
from trainer.assembly import build_run
from trainer.checkpoint.content import read_checkpoint
from trainer.checkpoint.store import find_checkpoint
from trainer.checkpoint.trained import restore_trained
from trainer.data.batch import MicroBatch
from trainer.data.loader import EvaluationLoader
from trainer.distillation import Targets
from trainer.engine import open_engine
from trainer.layout import TimeLayout, lay_out
from trainer.loop import TrainingRun
from trainer.models.recognizer import Recognizer
from trainer.models.temporal_head import Outputs
from trainer.observe.progress import Progress
from trainer.parsing import parse_recipe
from trainer.signals import StopRequest

TEMPERATURE, STRIDE = 3.0, 4
SMALL = ["--rnn_size", "12", "--rnn_layers", "1"]
VIDEO = ["--frame_size", "32", "--norm", "group", *SMALL]
MODELS = {
    "features": ([*TINY, "--dropout", "0.5"], [*TINY, "--normalization", "none"]),
    "video": (
        ["--model", "i3d", "--width", "0.02", "--total_stride", "2", *VIDEO],
        ["--model", "mobilenet_v3_small", "--width", "0.2", "--trackers", "[]", *VIDEO],
    ),
}
"""Flags of teacher and student; the frames of a teacher of video are twice as fine as its student's."""


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Undo what a run does to its process."""
    yield
    reset_process()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of 32x32 pixels."""
    return synthesize(tmp_path_factory.mktemp("videos") / "corpus", clips=8)


def sharpen(weights: dict[str, Tensor]) -> None:
    """Let fresh weights say something that depends on the frames."""
    weights["head.classifier.weight"] *= 30.0


@dataclass
class Seen:
    """What a run's steps were made of, clip by clip."""

    clips: list[int] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    """What the student got."""
    targets: list[Tensor] = field(default_factory=list)
    """The teacher's distributions that entered the loss, on the student's frames."""


def take_steps(run: TrainingRun, count: int, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Take steps of a run, and look at them from beside."""
    seen = Seen()
    forward, targets, divergence = run.engine.forward, run.distillation.targets, distilling.divergence_sum
    lengths: list[int] = []

    def watch_student(features: Tensor, layout: TimeLayout) -> Outputs:
        # Copied: the loader's buffers are used again.
        seen.frames += [part.clone() for part in features.split(list(layout.input_lengths))]
        lengths[:] = layout.output_lengths
        return forward(features, layout)

    def watch_clips(cell: MicroBatch, *, made_up: bool = False) -> Targets | None:
        seen.clips += cell.clips
        return targets(cell, made_up=made_up)

    def watch_loss(logits: Tensor, said: Tensor, *, temperature: float, blank_weight: float = 1.0) -> Tensor:
        seen.targets += said.exp().split(lengths)
        return divergence(logits, said, temperature=temperature, blank_weight=blank_weight)

    monkeypatch.setattr(run.engine, "forward", watch_student)
    monkeypatch.setattr(run.distillation, "targets", watch_clips)
    monkeypatch.setattr(distilling, "divergence_sum", watch_loss)
    steps = run.loader.steps(0, 0, size=4, rank=0, world_size=1, budget=run.memory.value)
    with closing(steps):
        for _ in range(count):
            assert run._attempt(*next(steps), 1e-3).applied
    return seen


def ask_by_hand(teacher: Recognizer, frames: Tensor) -> Tensor:
    """Let the teacher see one clip by itself; return its softened distributions, as many as the student's frames."""
    with torch.no_grad():
        logits = teacher(frames, lay_out(np.array([len(frames)]), teacher.total_stride))
    own, ratio = (logits / TEMPERATURE).softmax(dim=-1), STRIDE // teacher.total_stride
    return torch.stack([own[first : first + ratio].mean(dim=0) for first in range(0, len(own), ratio)])


@pytest.mark.parametrize(
    ("kind", "flags", "most_unchanged"),
    [
        ("features", [], 8),
        ("features", ["--augment", "true"], 0),
        # Where the share of the partner is drawn close to 0, little changes.
        ("features", ["--mixup_alpha", "0.4"], 4),
        ("video", [], 8),
        ("video", ["--augment", "true", "--augment_flip", "true"], 0),
    ],
)
def test_the_loss_is_made_of_what_the_teacher_says_of_the_frames_that_the_student_got(
    corpus: Path,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    flags: list[str],
    most_unchanged: int,
) -> None:
    data = corpus if kind == "features" else videos
    theirs, ours = MODELS[kind]
    publish(tmp_path / "teacher", data, *theirs, change=sharpen)
    common = ["--data_dir", str(data), "--output_dir", str(tmp_path / "run"), "--num_workers", "0", "--dropout", "0.5"]
    recipe = parse_recipe([*common, *ours, *flags, "--teacher", str(tmp_path / "teacher"), "--batch_size", "4"])
    engine = open_engine(recipe)
    run = build_run(recipe, engine, Progress(enabled=False), StopRequest())
    run.engine.training(True)
    seen = take_steps(run, 2, monkeypatch)
    folder = find_checkpoint(tmp_path / "teacher")
    teacher = restore_trained(read_checkpoint(folder), str(folder)).eval()
    assert len(seen.clips) == len(seen.frames) == len(seen.targets) == 8
    unchanged = 0
    for clip, frames, said in zip(seen.clips, seen.frames, seen.targets, strict=True):
        torch.testing.assert_close(said, ask_by_hand(teacher, frames), rtol=0, atol=1e-5)
        clean = EvaluationLoader(
            split=run.corpus.train,
            normalization=run.corpus.normalization,
            vocabulary=run.corpus.vocabulary,
            total_stride=STRIDE,
            num_workers=0,
            device=engine.device,
        )
        with clean.cell(np.array([clip])) as cell:
            untouched = ask_by_hand(teacher, cell.features)
        # Not another clip's frames, and not these before the augmentation.
        unchanged += said.shape == untouched.shape and float((said - untouched).abs().max()) <= 1e-5
    run.relief.close()
    assert unchanged == 8 if not flags else unchanged <= most_unchanged
