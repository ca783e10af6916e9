"""A teacher that cannot see what a student of video sees: one clear error, and nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import reset_process
from tests.publishing import publish
from tests.videos import annotate, make_frames, write_frames
from trainer.errors import InputError
from trainer.train import main as train

MODEL = ["--model", "mobilenet_v3_small", "--width", "0.05", "--rnn_size", "8"]


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Undo what a run does to its process."""
    yield
    reset_process()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of 32x32 pixels in train, two others in dev."""
    folder = tmp_path_factory.mktemp("videos")
    for name in "abcd":
        write_frames(folder / name, make_frames(24))
    annotate(folder, ["a|a|S1|X Y", "b|b|S1|X Y"])
    (folder / "dev.corpus.csv").write_text("id|folder|signer|annotation\nc|c|S1|X Y\nd|d|S1|X Y\n")
    return folder


@pytest.mark.parametrize(
    ("teacher", "size", "said"),
    [
        ("features", "32", "the teacher takes features, the student video"),
        ("video", "40", "the teacher was trained on 28 of 32 pixels, the student sees 35 of 40"),
    ],
)
def test_a_teacher_of_another_input_is_refused(
    videos: Path, tmp_path: Path, teacher: str, size: str, said: str
) -> None:
    if teacher == "video":
        publish(tmp_path / "teacher", videos, *MODEL, "--frame_size", "32")
    else:
        features = annotate(tmp_path / "features", ["a|a|S1|X Y"])
        (features / "train").mkdir()
        np.savez(features / "train" / "a.npz", features=np.zeros((24, 3), np.float32))
        publish(tmp_path / "teacher", features, "--width", "0.02", "--rnn_size", "8")
    flags = ["--data_dir", str(videos), "--output_dir", str(tmp_path / "run"), *MODEL, "--frame_size", size]
    with pytest.raises(InputError) as refused:
        train([*flags, "--trackers", "[]", "--num_workers", "0", "--teacher", str(tmp_path / "teacher")])
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()
