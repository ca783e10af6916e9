"""Clips as folders of PNG or JPEG frames."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from trainer.data.video.view import View
from trainer.errors import InputError

# For the whole process: to do it around each reading would not be safe in threads. Larger images still are errors.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]

_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_TAIL_BYTES = 64
"""Some cameras pad a JPEG after its end mark."""
_MEND_COLORS = "convert all frames to RGB (magick mogrify -type TrueColor -alpha off), or extract them anew"
# What a damaged image makes Pillow raise.
_UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def is_frame(name: str) -> bool:
    """Tell by its name whether a file is a frame."""
    return os.path.splitext(name)[1].lower() in _KINDS and not name.startswith(".")  # noqa: PTH122 - a name, no path


def list_frames(folder: Path) -> list[str]:
    """List the frames of a clip in their order: `2.png` before `10.png`.

    Raises `InputError` for a folder that cannot be read, has no frames, or has PNG and JPEG frames.
    """
    try:
        names = [name for name in os.listdir(folder) if is_frame(name)]  # noqa: PTH208 - names, 140 a clip
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); mend the path or its rights") from None
    if not names:
        raise InputError(f"{folder}: expected the frames of a clip (*.png or *.jpg), found none; extract them there")
    kinds = {_kind(name) for name in names}
    if len(kinds) > 1:
        found = " and ".join(sorted(kinds))
        raise InputError(f"{folder}: expected frames of one kind, found {found} files; remove the copies of the others")
    return sorted(names, key=_natural)


def read_image_frames(
    folder: Path, names: Sequence[str], view: View, out: Pixels, *, frame_size: int, crop_size: int
) -> None:
    """Decode the frames of a view into `out` `[n, crop, crop, 3]`; each file is decoded once."""
    first: dict[int, int] = {}
    size: Size | None = None
    for place, frame in enumerate(view.frames.tolist()):
        if (known := first.setdefault(frame, place)) != place:
            out[place] = out[known]
            continue
        path = folder / names[frame]
        try:
            with _open(path) as image:
                size = size or image.size
                if image.size != size:
                    raise InputError(_describe_size(path, image.size, size))
                place_frame(image, view, out[place], frame_size=frame_size, crop_size=crop_size)
        except _UNREADABLE as error:
            raise InputError(_describe(path, error)) from None


def place_frame(image: Image.Image, view: View, out: Pixels, *, frame_size: int, crop_size: int) -> None:
    """Bring a frame to `frame_size` a side, and its crop into `out` `[crop, crop, 3]`.

    The sides change independently, as PHOENIX's own 256x256 frames came from 210x260 ones. Only the crop is computed.
    """
    if image.size == (frame_size, frame_size):
        place_crop(np.asarray(image), view, out, crop_size=crop_size)
    else:
        across, down = image.width / frame_size, image.height / frame_size
        corner = (view.left * across, view.top * down)
        box = (
            *corner,
            min(image.width, corner[0] + crop_size * across),
            min(image.height, corner[1] + crop_size * down),
        )
        pixels = np.asarray(image.resize((crop_size, crop_size), Image.Resampling.BILINEAR, box=box))
        out[:] = pixels[:, ::-1] if view.flip else pixels


def place_crop(pixels: Pixels, view: View, out: Pixels, *, crop_size: int) -> None:
    """Copy the crop of a frame `[H, W, 3]` into `out` `[crop, crop, 3]`."""
    crop = pixels[view.top : view.top + crop_size, view.left : view.left + crop_size]
    out[:] = crop[:, ::-1] if view.flip else crop


def check_images(folder: Path, names: Sequence[str]) -> list[str]:
    """Check that every frame is whole, RGB, and of the size of the first; decodes nothing. Returns the problems."""
    problems: list[str] = []
    expected: Size | None = None
    for name in names:
        path = folder / name
        try:
            size = _check_image(path)
        except _UNREADABLE as error:
            problems.append(_describe(path, error))
            continue
        except InputError as error:
            problems += error.problems
            continue
        expected = expected or size
        if size != expected:
            problems.append(_describe_size(path, size, expected))
            break
    # Frames of one clip fail alike: a few of them say it.
    return problems if len(problems) <= 3 else [*problems[:2], f"{folder}: and {len(problems) - 2} more bad frames"]


def _check_image(path: Path) -> Size:
    with _open(path, load=False) as image:
        size, kind = image.size, str(image.format)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        if _ENDS[kind] not in file.read():
            raise InputError(f"{path}: the {kind} file is cut short, its end mark is missing; copy or extract it anew")
    return size


def _open(path: Path, *, load: bool = True) -> Image.Image:
    # Read at once: Pillow's many small reads each wait for a network's file system.
    source = io.BytesIO(path.read_bytes()) if load else path
    image = Image.open(source, formats=("PNG", "JPEG"))
    if image.mode != "RGB":
        image.close()
        raise InputError(f"{path}: expected RGB, found {_mode(image.mode)}; {_MEND_COLORS}")
    return image


def _mode(mode: str) -> str:
    names = {"L": "grey-scale", "LA": "grey-scale with alpha", "P": "a palette", "1": "black and white"}
    return f"{names[mode]} ({mode})" if mode in names else mode


def _describe(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: the frame is gone; do not change a corpus during a run"
    what = str(getattr(error, "strerror", None) or error)
    return f"{path}: not a whole PNG or JPEG frame ({what}); copy or extract it anew"


def _kind(name: str) -> str:
    return _KINDS[os.path.splitext(name)[1].lower()]  # noqa: PTH122 - a name, no path


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _describe_size(path: Path, found: Size, expected: Size) -> str:
    sizes = [f"{width}x{height}" for width, height in (expected, found)]
    return f"{path}: expected {sizes[0]} pixels as in the clip's first frame, found {sizes[1]}; extract the clip anew"
