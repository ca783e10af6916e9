"""Clips as a user hands them over to a model: a file of features, a folder of frames, or a video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.features import peek_shape, read_features
from trainer.data.video.container import check_video, count_frames, frame_rate, read_video_frames
from trainer.data.video.images import check_images, list_frames, read_image_frames
from trainer.data.video.sources import VIDEO_SUFFIXES
from trainer.data.video.view import central_view
from trainer.errors import InputError
from trainer.export.recognition import Card, Recognition


@dataclass(frozen=True, kw_only=True)
class InputClip:
    """A clip as a model takes it."""

    values: npt.NDArray[Any]
    """Features float32 `[T, D]`, or frames uint8 `[T, crop, crop, 3]`."""
    fps: float | None
    """Frames per second as the file says; None: it does not."""


def check_clips(paths: list[Path], recognition: Recognition) -> None:
    """Read all clips to their ends; raises one `InputError` with all that is wrong with any of them."""
    problems = [problem for path in paths for problem in _check(path, recognition)]
    if problems:
        raise InputError(problems)


def read_clip(path: Path, card: Card) -> InputClip:
    """Read a clip, each frame of a video brought to the size and cut to the middle that the model was trained on.

    Raises `InputError` that names the file, for one that is damaged.
    """
    if not card.is_video:
        return InputClip(values=read_features(path), fps=None)
    names = list_frames(path) if path.is_dir() else []
    num_frames = len(names) or count_frames(path)
    sizes = {"frame_size": card.frame_size, "crop_size": card.crop_size}
    view, frames = central_view(num_frames, **sizes), np.empty((num_frames, *card.frame_shape), np.uint8)
    if names:
        read_image_frames(path, names, view, frames, **sizes)
        return InputClip(values=frames, fps=None)
    read_video_frames(path, num_frames, view, frames, **sizes)
    return InputClip(values=frames, fps=frame_rate(path))


def _check(path: Path, recognition: Recognition) -> list[str]:
    card = recognition.card
    if problem := _wrong_kind(path, card):
        return [problem]
    try:
        problems, num_frames = _check_frames(path, card) if card.is_video else _check_features(path, card)
    except InputError as error:
        return list(error.problems)
    if not problems and num_frames < recognition.min_frames:
        return [
            f"{path}: has {num_frames} frames, this export takes {recognition.min_frames} or more; use the run, or an "
            "export to another format"
        ]
    return problems


def _wrong_kind(path: Path, card: Card) -> str:
    """Say that a path is none of the kind that the model takes; empty if it is one."""
    videos = ", ".join(VIDEO_SUFFIXES)
    suffix, is_folder = path.suffix.lower(), path.is_dir()
    if not path.exists():
        return f"{path}: no such file; mend the path"
    if not is_folder and suffix not in (".npz", *VIDEO_SUFFIXES):
        return f"{path}: expected features (.npz), a video ({videos}) or a folder of frames; convert it to one of them"
    model = card.model.get("model", "the model")
    if card.is_video and suffix == ".npz" and not is_folder:
        return f"{path}: holds features, {model} takes video; name a video ({videos}) or a folder of frames"
    if not card.is_video and (is_folder or suffix != ".npz"):
        return f"{path}: is video, {model} takes features (.npz); extract them first, or use a model of video"
    return ""


def _check_features(path: Path, card: Card) -> tuple[list[str], int]:
    num_frames, dim = peek_shape(path)
    if dim != card.feature_dim:
        return [f"{path}: expected D = {card.feature_dim} as in training, found {dim}; extract it anew"], num_frames
    # Reading finds what the header does not tell: damage further on, and values that are not finite.
    read_features(path)
    return [], num_frames


def _check_frames(path: Path, card: Card) -> tuple[list[str], int]:
    if not path.is_dir():
        num_frames = count_frames(path)
        return check_video(path, num_frames), num_frames
    names = list_frames(path)
    problems = check_images(path, names)
    if not problems:
        # Headers and ends are those of whole images; what lies between them shows when it is decoded.
        read_clip(path, card)
    return problems, len(names)
