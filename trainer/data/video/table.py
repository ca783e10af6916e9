"""The clips of a video corpus as a table: lengths without decoding, frames decoded as they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.annotations import Annotation, find_annotation_file, read_annotation_file
from trainer.data.corpus import Clip
from trainer.data.features import ClipScan
from trainer.data.table import Ints, ListedTable, Split, Storage, Stored
from trainer.data.video.container import check_video, count_frames, frame_rate, read_video_frames
from trainer.data.video.images import check_images, list_frames, read_image_frames
from trainer.data.video.sources import SourceFinder
from trainer.data.video.view import View, central_view
from trainer.errors import InputError, name_some

_LISTING_THREADS = 8
"""Listing folders is waiting for the file system: milliseconds each on network storage."""
_MOST_BAD_CLIPS = 10


class VideoTable(ListedTable):
    """Clips that are each a folder of frames, or a video file."""

    def __init__(self, split: str, clips: Sequence[Clip], where: str, *, frame_size: int, crop_size: int) -> None:
        storage = Storage(dtype=np.dtype(np.uint8), frame_size=frame_size, crop_size=crop_size)
        super().__init__(split, clips, crop_size * crop_size * 3, where, storage)

    def frame_rate(self, row: int) -> float | None:
        """Return the frames per second of a video file, as its header says them; None for a folder of frames."""
        source = self.clips[row].source
        return None if source.is_dir() else frame_rate(source)

    def read_view(self, row: int, view: View, out: npt.NDArray[np.uint8]) -> None:
        """Decode the frames of a view of a clip into `out` `[n, crop, crop, 3]`.

        Raises `InputError` that names the file, for one that is damaged or no longer what it was when the run began.
        """
        clip, frame_size, crop_size = self.clips[row], self.storage.frame_size, self.storage.crop_size
        if clip.source.is_dir():
            names = list_frames(clip.source)
            if len(names) != clip.num_frames:
                raise InputError(
                    f"{clip.source}: holds {len(names)} frames, {clip.num_frames} when the run began; do not change a "
                    "corpus during a run"
                )
            read_image_frames(clip.source, names, view, out, frame_size=frame_size, crop_size=crop_size)
        else:
            read_video_frames(clip.source, clip.num_frames, view, out, frame_size=frame_size, crop_size=crop_size)

    def read(self, row: int, buffer: Stored, *, verify: bool) -> Stored:
        """Decode the middle of a clip's first frames into `buffer` `[n, crop, crop, 3]`; decoding checks by itself."""
        storage = self.storage
        view = central_view(len(buffer), frame_size=storage.frame_size, crop_size=storage.crop_size)
        self.read_view(row, view, buffer)
        return buffer

    def scan(self, row: int) -> ClipScan:
        """Check a clip: each frame's header and end, or a video decoded to its end."""
        clip = self.clips[row]
        try:
            if clip.source.is_dir():
                problems = check_images(clip.source, list_frames(clip.source))
            else:
                problems = check_video(clip.source, clip.num_frames)
        except InputError as error:
            problems = list(error.problems)
        if problems:
            return ClipScan(problem="; ".join(problems))
        return ClipScan(num_frames=clip.num_frames, dim=self.feature_dim)

    def stamp(self, rows: Sequence[int] | Ints) -> str:
        """Hash the times of change of the clips' folders or files, and their frames, but not where they lie.

        A frame that is replaced in place, under its own name, does not show.
        """
        facts = []
        for row in rows:
            clip, stat = self.clips[row], self.clips[row].source.stat()
            size = clip.num_frames if clip.source.is_dir() else stat.st_size
            facts.append((clip.split, clip.id, size, stat.st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_video_split(
    data_dir: Path,
    annotations: str,
    split: str,
    *,
    frame_size: int,
    crop_size: int,
    allow_missing: bool,
    log: Callable[[str], None],
) -> Split:
    """Join the annotations of one split with the frames of its clips, in the order of the annotation file.

    Decodes nothing: frames are counted by listing folders, or by a video's index. With `allow_missing`, clips that are
    nowhere are left out, aloud. Raises one `InputError` with every problem found.
    """
    lines = read_annotation_file(find_annotation_file(annotations, split))
    finder = SourceFinder(data_dir, split, frame_size=frame_size)
    sources = [(line, finder.find(line)) for line in lines]
    joined = [(line, source) for line, source in sources if source is not None]
    problems: list[str] = []
    if missing := [line for line, source in sources if source is None]:
        named = name_some([f"{line.id} (line {line.line})" for line in missing])
        what = f"{finder.main}: {len(missing)} of {len(lines)} annotated clips have no frames: {named}"
        if allow_missing and joined:
            log(f"{what}; dropped, as --allow_missing says")
        else:
            mend = "or drop them with --allow_missing" if joined else "or the ids, none of which has any"
            problems.append(
                f"{what}; expected {finder.example(missing[0])}, for one; extract them, mend --data_dir, {mend}"
            )
    first: dict[Path, Annotation] = {}
    problems += [
        f"{source}: expected to serve one clip, found two: {other.id} (line {other.line}) and {line.id} "
        f"(line {line.line}); remove or rename one of them"
        for line, source in joined
        if (other := first.setdefault(source, line)) is not line
    ]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        counts = list(pool.map(lambda item: _count(*item), joined))
    bad = [count for count in counts if isinstance(count, str)]
    if len(bad) > _MOST_BAD_CLIPS:
        more = f"{finder.main}: and {len(bad) - _MOST_BAD_CLIPS} more bad clips ({len(bad)} in all)"
        bad[_MOST_BAD_CLIPS:] = [more]
    if problems + bad:
        raise InputError(problems + bad)
    clips = [
        Clip(id=line.id, split=split, signer=line.signer, num_frames=count, glosses=line.glosses, source=source)
        for (line, source), count in zip(joined, counts, strict=True)
        if isinstance(count, int)
    ]
    return Split(VideoTable(split, clips, str(data_dir), frame_size=frame_size, crop_size=crop_size))


def _count(line: Annotation, source: Path) -> int | str:
    """Count a clip's frames, or say what is wrong with it."""
    try:
        count = len(list_frames(source)) if source.is_dir() else count_frames(source)
    except InputError as error:
        return str(error)
    if line.num_frames is not None and line.num_frames != count:
        return (
            f"{source}: holds {count} frames, line {line.line} of the annotations says {line.num_frames}; extract the "
            "clip anew, or correct the line"
        )
    return count


def video_table(split: Split) -> VideoTable:
    """Return the table of a split of a video corpus."""
    table: Any = split.table
    if not isinstance(table, VideoTable):
        raise TypeError(f"{split.name} of {table.where} holds features")
    return table
