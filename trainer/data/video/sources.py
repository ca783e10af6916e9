"""Where the frames of each clip lie: PHOENIX's folders, plain folders of frames, or video files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

from trainer.data.annotations import Annotation, find_annotation_file, read_annotation_file
from trainer.data.features import feature_paths
from trainer.data.video.images import is_frame
from trainer.errors import InputError

_FULL_FRAMES = re.compile(r"fullFrame-(\d+)x(\d+)px")
# Where corpora keep their frames, below the data directory; `{split}` folders come first.
_FOLDERS = ("", "frames", "videos", "features")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")
_PROBED = 20
"""Annotations that are looked for to tell what a corpus is made of."""


def is_video_corpus(data_dir: Path, annotations: str, split: str, *, wanted: bool | None = None) -> bool:
    """Tell a corpus of frames or video files from one of feature files, by where its annotated clips are found.

    A folder may hold both, features beside the frames they were extracted from: then it is what the model takes, if
    that is `wanted` frames, and else features.
    """
    try:
        lines = read_annotation_file(find_annotation_file(annotations, split))[:_PROBED]
    except InputError:
        # Told again, in full, by whoever reads the split; the files alone must say what it is.
        lines = []
    if not wanted and any(path.is_file() for line in lines for path in feature_paths(data_dir, split, line.id)):
        return False
    if full_frames(data_dir):
        return True
    finder = SourceFinder(data_dir, split, frame_size=0)
    return any(finder.find(line) for line in lines) or _holds_frames(data_dir / split)


def full_frames(data_dir: Path) -> dict[int, Path]:
    """Return PHOENIX's folders of whole frames, `features/fullFrame-210x260px` and the like, by their width."""
    found = {}
    for folder in (data_dir / "features").glob("fullFrame-*px"):
        match = _FULL_FRAMES.fullmatch(folder.name)
        if match and folder.is_dir():
            found[int(match[1])] = folder
    return found


class SourceFinder:
    """Finds the folder of frames, or the video file, of each clip of a split."""

    def __init__(self, data_dir: Path, split: str, *, frame_size: int) -> None:
        """Look where frames may lie; of PHOENIX's sizes the one of `frame_size` is taken, else the largest."""
        sizes = full_frames(data_dir)
        chosen = sizes.get(frame_size) or (sizes[max(sizes)] if sizes else None)
        bases = [chosen / split, chosen] if chosen else []
        for folder in _FOLDERS:
            bases += [data_dir / folder / split, data_dir / folder]
        self.bases = [base for base in bases if base.is_dir()]
        self.main = bases[0]
        """Where frames are expected in the first place, for messages."""
        self._found: tuple[Path, int] | None = None

    def find(self, line: Annotation) -> Path | None:
        """Return where a clip's frames lie; None if nowhere."""
        names = list(_names(line))
        # Clips of a corpus lie alike: what held for the last one spares looking in all other places.
        if self._found and self._found[1] < len(names):
            path = self._found[0] / names[self._found[1]]
            if _is_source(path):
                return path
        for base in self.bases:
            for place, name in enumerate(names):
                if _is_source(path := base / name):
                    self._found = (base, place)
                    return path
        return None

    def example(self, line: Annotation) -> str:
        """Say where a clip's frames are expected."""
        return f"{self.main / line.id}/*.png or {self.main / line.id}.mp4"


def _names(line: Annotation) -> Iterator[str]:
    """Yield the names that a clip's frames may have below a base, the most explicit one first."""
    folder = PurePosixPath(line.folder.replace("\\", "/"))
    if line.folder and ".." not in folder.parts and not folder.is_absolute():
        # PHOENIX names the frames by a pattern, `<id>/1/*.png`.
        if "*" in folder.name:
            folder = folder.parent
        yield str(folder)
        # PHOENIX-2014T's files say `<id>/1/*.png` of frames that lie in `<id>`.
        yield str(folder.parent) if folder.name == "1" else f"{folder}/1"
    # A folder's sub-folder first: the outer one has no frames of its own.
    yield f"{line.id}/1"
    yield line.id
    for suffix in VIDEO_SUFFIXES:
        yield f"{line.id}{suffix}"


def _is_source(path: Path) -> bool:
    """Tell whether a clip may lie here: a video file, or a folder that holds anything but folders alone."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return path.is_file()
    # An empty folder is a clip without frames, which is another mistake than a clip without a folder.
    return path.is_dir() and not _only_folders(path)


def _only_folders(path: Path) -> bool:
    first = list(islice(path.iterdir(), 2))
    return bool(first) and all(entry.is_dir() for entry in first)


def _holds_frames(folder: Path) -> bool:
    """Tell whether there are frames or videos in a folder or in the first ones below it, without listing all."""
    if not folder.is_dir():
        return False
    below: list[Path] = []
    for entry in islice(folder.iterdir(), 100):
        if is_frame(entry.name) or entry.suffix.lower() in VIDEO_SUFFIXES:
            return True
        below += [entry] if entry.is_dir() else []
    return any(is_frame(entry.name) for place in below[:5] for entry in _first(place))


def _first(folder: Path) -> Sequence[Path]:
    inner = list(islice(folder.iterdir(), 5))
    return [*inner, *(entry for place in inner if place.is_dir() for entry in islice(place.iterdir(), 5))]
