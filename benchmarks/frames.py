"""Frames: what it costs to read video, and to compute on clips of several lengths, in processor time.

Reading: a clip of PHOENIX's size, from the page cache, decoded, resized and cropped into bytes by the trainer's own
readers. The usual way, for comparison: Pillow's image, resized whole, cropped, as float32 normalised on the CPU.
Computing: forward and backward pass of the video models over clips packed along time, against one pass a clip, and
against a batch padded to its longest clip. The ways take turns in every round; a ratio is the median of the ratios
round by round. One thread. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

# Run as a file, Python looks beside the file and not where the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.data.signing import LATENTS
from trainer.data.video.color import apply_color
from trainer.data.video.container import check_video, read_video_frames
from trainer.data.video.images import check_images, list_frames, read_image_frames
from trainer.data.video.rendering import render
from trainer.data.video.view import Color, central_view
from trainer.layout import lay_out
from trainer.models.build import build_model
from trainer.models.recognizer import Recognizer
from trainer.recipe import ModelRecipe

FRAME, CROP = 256, 224
STORED = (210, 260)
"""Width and height of PHOENIX's frames."""
VIDEO = (320, 180)
SUFFIXES = {"PNG": "png", "JPEG": "jpg"}
LENGTHS = (12, 20, 28, 36, 44, 60)
"""Frames of the clips that the models compute: 200 in all, 360 padded."""
MODELS = ("i3d", "mobilenet_v3_small", "mobilenet_v3_large")
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

Way = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print two tables, end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100, help="frames of the clip that is read (default 100)")
    parser.add_argument("--model_size", type=int, default=64, help="pixels a side of the models' frames (default 64)")
    parser.add_argument("--width", type=float, default=1.0, help="width of the models (default 1.0)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured, in turn (default 5)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}")
    figures: dict[str, float] = {}
    print(f"\n{'reading':<44}{'frames per CPU second':>22}{'over the usual way':>20}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, ways in reading_ways(Path(folder), args.frames).items():
            times = measure(ways, args.rounds)
            usual = times["the usual way"]
            for name, spent in times.items():
                speed = args.frames / statistics.median(spent)
                ratio = statistics.median(other / own for other, own in zip(usual, spent, strict=True))
                print(f"{f'{kind}, {name}':<44}{speed:>22,.0f}{ratio:>20.2f}")
                key = f"{kind} {name}".replace(",", "").replace(" ", "_")
                figures |= {f"{key}_fps": round(speed, 1), f"{key}_ratio": round(ratio, 3)}
    print(f"\n{'computing, forward and backward':<44}{'CPU seconds':>22}{'of one pass a clip':>20}")
    for model in MODELS:
        times = measure(computing_ways(model, args.model_size, args.width), args.rounds)
        for name, spent in times.items():
            ratio = statistics.median(own / alone for alone, own in zip(times["a clip a pass"], spent, strict=True))
            print(f"{f'{model}, {name}':<44}{statistics.median(spent):>22.2f}{ratio:>20.2f}")
            figures[f"{model}_{name.replace(' ', '_')}_seconds"] = round(statistics.median(spent), 4)
            figures[f"{model}_{name.replace(' ', '_')}_ratio"] = round(ratio, 3)
    print(f"\nload {os.getloadavg()[0]:.1f}")
    print(json.dumps(figures))
    return 0


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of each way in each round; a round before them warms caches up."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if number:
                spent[name].append(time.process_time() - began)
    return spent


# Reading.


def reading_ways(folder: Path, count: int) -> dict[str, dict[str, Way]]:
    """Write one clip in every form and return how each is read."""
    frames = draw_clip(count)
    view, out = central_view(count, frame_size=FRAME, crop_size=CROP), np.empty((count, CROP, CROP, 3), np.uint8)

    def read(clip: Path) -> None:
        if clip.is_dir():
            read_image_frames(clip, list_frames(clip), view, out, frame_size=FRAME, crop_size=CROP)
        else:
            read_video_frames(clip, count, view, out, frame_size=FRAME, crop_size=CROP)

    def check(clip: Path) -> None:
        problems = check_images(clip, list_frames(clip)) if clip.is_dir() else check_video(clip, count)
        assert not problems, problems

    ways: dict[str, dict[str, Way]] = {}
    for kind in ("PNG", "JPEG"):
        stored = write_images(folder / kind, frames, kind, STORED)
        ready = write_images(folder / f"{kind}-ready", frames, kind, (FRAME, FRAME))
        ways[f"{kind} 210x260"] = {
            "the usual way": partial(read_usually, stored),
            "decoded alone": partial(decode, stored),
            "resized, crop of 224": partial(read, stored),
            "stored as 256x256, crop of 224": partial(read, ready),
            "checked, not decoded": partial(check, stored),
        }
    video = write_video(folder / "clip.mp4", frames)
    ways["H.264 320x180"] = {
        "the usual way": partial(read_usually, video),
        "checked, decoded alone": partial(check, video),
        "resized, crop of 224": partial(read, video),
    }
    color, seen = Color(brightness=1.1, contrast=0.9, saturation=1.1), torch.from_numpy(out)
    ways["H.264 320x180"]["its colours changed"] = partial(apply_color, seen, color)
    return ways


def draw_clip(count: int) -> np.ndarray:
    """Render signing as `signscale synth` does, frames `[count, 256, 256, 3]` with the noise of a sensor."""
    rng = np.random.default_rng(0)
    movement = np.cumsum(rng.normal(0.0, 0.2, (count, LATENTS)), axis=0)
    return render(movement, size=FRAME, signer=1, noise=0.5, rng=rng)


def write_images(folder: Path, frames: np.ndarray, kind: str, size: tuple[int, int]) -> Path:
    """Write a folder of frames."""
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR).save(folder / f"{number:04d}.{SUFFIXES[kind]}")
    return folder


def write_video(path: Path, frames: np.ndarray) -> Path:
    """Encode the frames as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = VIDEO
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(*VIDEO)))
        container.mux(stream.encode(None))
    return path


def decode(folder: Path) -> None:
    """Decode each frame and nothing else."""
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            image.load()


def read_usually(clip: Path) -> np.ndarray:
    """Read a clip as is usual: image by image, resized whole, cropped, normalised as float32."""
    corner, frames = (FRAME - CROP) // 2, []
    for image in images_of(clip):
        resized = image.convert("RGB").resize((FRAME, FRAME), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized.crop((corner, corner, corner + CROP, corner + CROP)))
        frames.append((pixels.astype(np.float32) / 255.0 - _MEAN) / _STD)
    return np.stack(frames)


def images_of(clip: Path) -> Iterator[Image.Image]:
    """Yield the images of a folder or of a video."""
    if clip.is_dir():
        for path in sorted(clip.iterdir()):
            with Image.open(path) as image:
                yield image
    else:
        with av.open(str(clip)) as container:
            for frame in container.decode(video=0):
                yield frame.to_image()


# Computing.


def computing_ways(name: str, size: int, width: float) -> dict[str, Way]:
    """Return the passes over the same clips: packed along time, one by one, and padded to the longest."""
    torch.manual_seed(0)
    recipe = ModelRecipe(model=name, width=width)  # type: ignore[arg-type]
    model = build_model(recipe, feature_dim=0, num_classes=1296)
    clips = [torch.randint(0, 256, (length, size, size, 3), dtype=torch.uint8) for length in LENGTHS]
    longest = max(LENGTHS)
    padded = [F.pad(clip, (0, 0, 0, 0, 0, 0, 0, longest - len(clip))) for clip in clips]
    return {
        "packed": partial(step, model, [clips]),
        "a clip a pass": partial(step, model, [[clip] for clip in clips]),
        "padded": partial(step, model, [padded]),
    }


def step(model: Recognizer, passes: list[list[torch.Tensor]]) -> None:
    """Make the passes of a step, forward and backward."""
    model.zero_grad()
    for clips in passes:
        layout = lay_out(np.array([len(clip) for clip in clips]), model.total_stride)
        model(torch.cat(clips), layout).square().sum().backward()


if __name__ == "__main__":
    sys.exit(main())
