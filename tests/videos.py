"""Tiny video corpora, written anew for each test that spoils one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from launch.synth import main as synth_command
from trainer.data.table import Split
from trainer.data.video.table import read_video_split

Pixels = npt.NDArray[np.uint8]
SIZE, CROP = 32, 24


def make_frames(count: int, *, size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> Pixels:
    """Smooth frames `[count, height, width, 3]` whose red channel tells their number (times 8)."""
    width, height = size
    draws = np.random.default_rng(seed)
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[..., 0] = (8 * np.arange(count))[:, None, None]
    frames[..., 1] = np.linspace(0, 255, width).astype(np.uint8)
    frames[..., 2] = np.linspace(0, 200 + draws.integers(50), height).astype(np.uint8)[:, None]
    return frames


def write_frames(folder: Path, frames: Sequence[Pixels], *, suffix: str = ".png", first: int = 0) -> Path:
    """Write frames `0.png, 1.png, …`, their numbers not padded."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, start=first):
        Image.fromarray(frame).save(folder / f"frame{number}{suffix}")
    return folder


def write_video(path: Path, frames: Pixels, *, codec: str = "libx264", pixels: str = "yuv420p", rate: int = 25) -> Path:
    """Encode frames into a container of the path's kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def annotate(data_dir: Path, lines: Sequence[str], *, header: str = "id|folder|signer|annotation") -> Path:
    """Write the annotations of train and dev, the same for both."""
    data_dir.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        (data_dir / f"{split}.corpus.csv").write_text("\n".join([header, *lines]) + "\n")
    return data_dir


def open_split(data_dir: Path, split: str = "train", *, size: int = SIZE, crop: int = CROP) -> Split:
    """Open a split as the trainer does."""
    return read_video_split(
        data_dir, str(data_dir), split, frame_size=size, crop_size=crop, allow_missing=False, log=lambda text: None
    )


def synthesize(out: Path, *, clips: int) -> Path:
    """Write a synthetic corpus in PHOENIX-2014's layout, frames of 32x32 pixels."""
    flags = ["--clips", str(clips), "--vocabulary", "4", "--frame_size", str(SIZE), "--seed", "5"]
    assert synth_command(["--layout", "phoenix2014", "--out", str(out), *flags]) == 0
    return out
