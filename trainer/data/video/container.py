"""Clips as mp4 or webm files, decoded by PyAV, which brings FFmpeg along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from trainer.data.video.images import place_crop
from trainer.data.video.view import View
from trainer.errors import InputError

Pixels = npt.NDArray[np.uint8]

_MEND = "copy or encode it anew (ffmpeg -i IN -pix_fmt yuv420p OUT.mp4)"


def count_frames(path: Path) -> int:
    """Count the frames of a video without decoding: what its index says, or its packets where it has no index."""
    with _opened(path) as (container, stream):
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not count:
        raise InputError(f"{path}: expected the frames of a clip, found none; {_MEND}")
    return count


def frame_rate(path: Path) -> float | None:
    """Return the frames per second of a video, their mean where they vary; None where the file does not say."""
    with _opened(path) as (_, stream):
        return float(stream.average_rate) if stream.average_rate else None


def check_video(path: Path, num_frames: int) -> list[str]:
    """Decode a video to its end and compare what it holds with what its index says. Returns the problems."""
    try:
        found, size = 0, None
        for frame in _decode(path):
            found, here = found + 1, (frame.width, frame.height)
            size = size or here
            if here != size:
                return [
                    f"{path}: expected {size[0]}x{size[1]} pixels as in its first frame, found {here[0]}x{here[1]} in "
                    f"frame {found}; {_MEND}"
                ]
    except InputError as error:
        return list(error.problems)
    return [_miscounted(path, found, num_frames)] if found != num_frames else []


def read_video_frames(path: Path, num_frames: int, view: View, out: Pixels, *, frame_size: int, crop_size: int) -> None:
    """Decode the frames of a view into `out` `[n, crop, crop, 3]`, up to the last one that it needs."""
    wanted: dict[int, list[int]] = {}
    for place, frame in enumerate(view.frames.tolist()):
        wanted.setdefault(frame, []).append(place)
    last = max(wanted)
    index, scaler = -1, VideoReformatter()
    for index, frame in enumerate(_decode(path)):
        if places := wanted.get(index):
            # Resized while colours are converted: three times as fast as one after the other.
            sized = scaler.reformat(frame, frame_size, frame_size, format="rgb24", interpolation="BILINEAR")
            place_crop(np.asarray(sized.to_ndarray(), dtype=np.uint8), view, out[places[0]], crop_size=crop_size)
            for place in places[1:]:
                out[place] = out[places[0]]
        if index == last:
            return
    raise InputError(_miscounted(path, index + 1, num_frames))


def _decode(path: Path) -> Iterator[VideoFrame]:
    with _opened(path) as (container, stream):
        # The loader's threads are the ones that decode; a team of FFmpeg's own for each of them would crowd the cores.
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if frame.rotation:
                raise InputError(
                    f"{path}: to be shown turned by {frame.rotation} degrees, which most tools would ignore; encode it "
                    "upright (ffmpeg -i IN OUT.mp4 does)"
                )
            if frame.is_corrupt:
                raise InputError(f"{path}: a frame at {frame.time} s is damaged; {_MEND}")
            yield frame


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: expected a video, found no video stream; {_MEND}")
            stream = container.streams.video[0]
            components = {} if stream.format is None else {part.is_alpha for part in stream.format.components}
            if stream.format is None or not stream.format.components:
                raise InputError(f"{path}: not a whole video (what its pixels are is not known); {_MEND}")
            if len(stream.format.components) < 3 or True in components:
                raise InputError(
                    f"{path}: expected colours without transparency, found pixels of the kind {stream.format.name}; "
                    f"{_MEND}"
                )
            yield container, stream
    except FileNotFoundError:
        raise InputError(f"{path}: the video is gone; do not change a corpus during a run") from None
    except av.FFmpegError as error:
        raise InputError(f"{path}: not a whole video ({error.strerror}); {_MEND}") from None


def _miscounted(path: Path, found: int, expected: int) -> str:
    return (
        f"{path}: its index says {expected} frames, {found} can be decoded; the file is cut short or damaged: {_MEND}"
    )
