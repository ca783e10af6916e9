"""A synthetic corpus in the layout of a real feature corpus: its specification and its writing.

`signing` invents what is signed; this module decides which clip of which split gets what, and puts it on disk.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data import signing
from trainer.data.lengths import draw_adjacent_repeats, draw_phoenix_lengths
from trainer.data.video.rendering import render
from trainer.errors import InputError

SPLITS = ("train", "dev", "test")
EVALUATION_SHARE = 1 / 8
"""Dev and test each have this share of the number of training clips, and at least 4 clips."""
UNSEEN_EVERY = 4
"""Every fourth clip of dev and test is signed by a signer who is not in train."""
MIN_OCCURRENCES = 3
"""Every gloss of the vocabulary occurs at least this often in train."""
MIN_FRAME_SIZE = 32
MIN_CLIPS, MIN_VOCABULARY, MIN_FEATURES, MIN_SIGNERS = 5, 3, 32, 2


class _Defaults(NamedTuple):
    vocabulary_size: int
    feature_dim: int
    signers: int
    mean_frames: int
    derivatives: int
    stream_shares: tuple[float, float, float]  # pose, hands, face


_DEFAULTS = {
    "demo": _Defaults(16, 96, 10, 44, 0, (0.2, 0.45, 0.35)),
    # MediaPipe Holistic: 33 body, 42 hand and 468 face points of three coordinates, and three differences.
    "full": _Defaults(1295, 6516, 9, 141, 3, (99, 126, 1404)),
}


@dataclass(frozen=True, kw_only=True)
class SyntheticSpec:
    """Say which corpus to invent; the same spec gives the same bytes. Raises `InputError` on bad values.

    Every clip depends on its split, its index and the fields other than `clips`: a corpus of more clips
    begins with the clips of the smaller one, as long as the vocabulary is the same.
    """

    clips: int
    """Training clips; dev and test have an eighth of that each."""
    seed: int = 0
    """Seed of the language, the signers, the sensor and the clips."""
    size: Literal["demo", "full"] = "demo"
    """demo: 3-6 glosses in 20-60 frames. full: the lengths of PHOENIX-2014 at 25 frames per second."""
    vocabulary_size: int = 0
    """Glosses; 0: 16 (demo) or 1295 (full), or as many as `clips` can show three times each."""
    feature_dim: int = 0
    """Features per frame, D; 0: 96 (demo) or 6516 (full, three quarters of it temporal differences)."""
    signers: int = 0
    """Signers of all splits, a quarter of them kept out of train (at least one); 0: 10 (demo) or 9 (full)."""
    noise: float = 0.2
    """Standard deviation of the sensor's noise, where signing itself moves a coordinate within -1 and 1."""
    dropout: float = 0.01
    """Chance per frame and hand that its detection is lost, for 1-4 frames: zeros, as extractors write."""
    frame_size: int = 0
    """Pixels a side of rendered frames, in PHOENIX-2014's layout; 0: features."""

    def __post_init__(self) -> None:
        if self.size not in _DEFAULTS:
            raise InputError(f"--size {self.size}: choose one of {', '.join(_DEFAULTS)}")
        most = signing.ANCHORS * self.clips // MIN_OCCURRENCES
        defaults = _DEFAULTS[self.size]
        for name, value in (
            ("vocabulary_size", max(MIN_VOCABULARY, min(defaults.vocabulary_size, most))),
            ("feature_dim", defaults.feature_dim),
            ("signers", defaults.signers),
        ):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        problems = [
            f"{flag} {value:g}: use {least} or more"
            for flag, value, least in (
                ("--clips", self.clips, MIN_CLIPS),
                ("--seed", self.seed, 0),
                ("--vocabulary", self.vocabulary_size, MIN_VOCABULARY),
                ("--feature_dim", self.feature_dim, MIN_FEATURES),
                ("--signers", self.signers, MIN_SIGNERS),
                ("noise", self.noise, 0),
            )
            if not value >= least
        ]
        if self.frame_size and self.frame_size < MIN_FRAME_SIZE:
            problems.append(f"--frame_size {self.frame_size}: use {MIN_FRAME_SIZE} or more")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout {self.dropout:g}: use a chance in [0, 1)")
        if self.clips >= MIN_CLIPS and self.vocabulary_size > most:
            enough = -(-self.vocabulary_size * MIN_OCCURRENCES // signing.ANCHORS)
            problems.append(
                f"--vocabulary {self.vocabulary_size}: {self.clips} clips can show {most} glosses "
                f"{MIN_OCCURRENCES} times each; ask for fewer glosses or for --clips {enough}"
            )
        if problems:
            raise InputError(problems)

    @property
    def held_out_signers(self) -> int:
        """Count the signers who are in dev and test but not in train: the last ones."""
        return max(1, round(self.signers / 4))

    def clips_of(self, split: str) -> int:
        """Count the clips of a split."""
        return self.clips if split == "train" else max(4, round(self.clips * EVALUATION_SHARE))


class SyntheticClip(NamedTuple):
    """One invented clip."""

    id: str
    signer: str
    glosses: list[str]
    features: NDArray[np.generic]
    """Raw features, float32 [T, D], or frames, uint8 [T, H, W, 3]."""


class SplitSummary(NamedTuple):
    """What was written of a split."""

    split: str
    clips: int
    frames: int
    glosses: int
    bytes: int


@lru_cache(maxsize=2)
def _world(spec: SyntheticSpec) -> tuple[signing.Language, list[signing.Signer], signing.Sensor]:
    defaults = _DEFAULTS[spec.size]
    sensor = signing.invent_sensor(spec.feature_dim, defaults.derivatives, defaults.stream_shares, spec.seed)
    signers = [signing.invent_signer(index, spec.seed) for index in range(spec.signers)]
    return signing.invent_language(spec.vocabulary_size, spec.seed), signers, sensor


def _split_of(sentence: list[int]) -> str:
    """Return the split a sentence belongs to, wherever it comes up: this keeps the splits' sentences apart."""
    bucket = zlib.crc32(" ".join(map(str, sentence)).encode()) % 8
    return {0: "dev", 1: "test"}.get(bucket, "train")


def _draw_lengths(spec: SyntheticSpec, rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw a clip's frames, glosses and adjacent repeats, feasible for CTC at stride 4."""
    if spec.size == "full":
        frames, glosses = draw_phoenix_lengths(1, int(rng.integers(2**62)))
    else:
        glosses = rng.integers(3, 7, size=1)
        frames = np.clip(np.rint(4 + glosses * rng.uniform(8.0, 10.0)), 20, 60).astype(np.int64)
    repeats = draw_adjacent_repeats(frames, glosses, int(rng.integers(2**62)))
    most = 1 if spec.size == "demo" else int(glosses[0]) - signing.ANCHORS
    return int(frames[0]), int(glosses[0]), min(int(repeats[0]), most)


def invent_clip(spec: SyntheticSpec, split: str, index: int) -> SyntheticClip:
    """Invent clip `index` of a split, in any order and in any process.

    Guaranteed: `ceil(T / 4) >= glosses + adjacent repeats`; no sentence occurs in two splits; with all clips
    of train generated, every gloss of the vocabulary occurs there at least three times.
    """
    language, signers, sensor = _world(spec)
    rng = np.random.default_rng([spec.seed, 0, SPLITS.index(split), index])
    sentence = None
    while sentence is None or _split_of(sentence) != split:
        num_frames, num_glosses, repeats = _draw_lengths(spec, rng)
        sentence = signing.compose_sentence(language, index, num_glosses, repeats, rng)
    seen = spec.signers - spec.held_out_signers
    is_unseen = split != "train" and index % UNSEEN_EVERY == UNSEEN_EVERY - 1
    signer = int(rng.integers(seen, spec.signers) if is_unseen else rng.integers(seen))
    movement = signing.perform(language, signers[signer], sentence, num_frames, rng)
    features: NDArray[np.generic]
    if spec.frame_size:
        features = render(movement, size=spec.frame_size, signer=signer, noise=spec.noise, rng=rng)
    else:
        features = signing.observe(sensor, movement, spec.noise, spec.dropout, rng)
    return SyntheticClip(
        id=f"{split}-{index:06d}",
        signer=f"Signer{signer + 1:02d}",
        glosses=[f"GLOSS{gloss:04d}" for gloss in sentence],
        features=features,
    )


def write_corpus(spec: SyntheticSpec, out: Path, log: Callable[[str], None] = print) -> list[SplitSummary]:
    """Write the corpus to `out`, whole or not at all, and return what each split holds.

    `out/{train,dev,test}/<id>.npz` hold `features` float32 [T, D], `out/annotations/{split}.corpus.csv` hold
    `id|folder|signer|annotation` as PHOENIX writes it, and `out/synthetic.json` the spec, the streams' columns
    and the signers. With a frame size the layout is PHOENIX-2014's: PNG frames in
    `out/features/fullFrame-<size>x<size>px/<split>/<id>/1/`, annotations in `out/annotations/manual/`.
    Raises `InputError` when `out` exists and is not an empty directory, cannot be written or does not fit on its disk.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory: remove it or choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_space(spec, out.parent)
        # A sibling, so that the rename stays within one file system.
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            # Not the scratch directory itself: mkdtemp closes it to everybody else.
            corpus = scratch / "corpus"
            _annotations(spec, corpus).mkdir(parents=True)
            summaries = [_write_split(spec, split, corpus, log) for split in SPLITS]
            (corpus / "synthetic.json").write_text(json.dumps(_describe(spec), indent=2) + "\n", encoding="utf-8")
            corpus.rename(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
    return summaries


def _check_space(spec: SyntheticSpec, directory: Path) -> None:
    clips = sum(spec.clips_of(split) for split in SPLITS)
    # PNG saves little of noisy frames.
    frame_bytes = 3 * spec.frame_size**2 or spec.feature_dim * np.dtype(np.float32).itemsize
    needed = clips * _DEFAULTS[spec.size].mean_frames * frame_bytes
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"the corpus takes about {needed / 1e9:.1f} GB, {directory} has {free / 1e9:.1f} GB left: "
            f"lower --clips or --{'frame_size' if spec.frame_size else 'feature_dim'}, or choose another --out"
        )


def _write_split(spec: SyntheticSpec, split: str, corpus: Path, log: Callable[[str], None]) -> SplitSummary:
    folder = corpus / split
    if spec.frame_size:
        folder = corpus / "features" / f"fullFrame-{spec.frame_size}x{spec.frame_size}px" / split
    folder.mkdir(parents=True)

    def write(index: int) -> tuple[str, int, int, int]:
        clip = invent_clip(spec, split, index)
        if spec.frame_size:
            where, written = f"{clip.id}/1/*.png", _write_frames(folder / clip.id / "1", clip)
        else:
            where, written = f"{split}/{clip.id}.npz", _write_npz(folder / f"{clip.id}.npz", clip.features)
        line = f"{clip.id}|{where}|{clip.signer}|{' '.join(clip.glosses)}"
        return line, len(clip.features), len(clip.glosses), written

    with ThreadPoolExecutor() as pool:
        lines, frames, glosses, sizes = zip(*pool.map(write, range(spec.clips_of(split))), strict=True)
    annotations = ["id|folder|signer|annotation", *lines]
    (_annotations(spec, corpus) / f"{split}.corpus.csv").write_text("\n".join(annotations) + "\n", encoding="utf-8")
    summary = SplitSummary(split, len(lines), sum(frames), sum(glosses), sum(sizes))
    log(f"{split}: {summary.clips} clips")
    return summary


def _annotations(spec: SyntheticSpec, corpus: Path) -> Path:
    return corpus / "annotations" / ("manual" if spec.frame_size else "")


def _write_frames(folder: Path, clip: SyntheticClip) -> int:
    """Write PNG frames named as PHOENIX names them; return their bytes."""
    folder.mkdir(parents=True)
    written = 0
    for number, frame in enumerate(clip.features):
        path = folder / f"{clip.id}_fn{number:06d}-0.png"
        Image.fromarray(frame).save(path, compress_level=1)
        written += path.stat().st_size
    return written


def _write_npz(path: Path, features: NDArray[np.generic]) -> int:
    # np.savez stamps the current time on every member; a fixed one keeps equal corpora equal in bytes.
    member = zipfile.ZipInfo("features.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive, archive.open(member, "w") as file:
        np.lib.format.write_array(file, features, allow_pickle=False)
    return path.stat().st_size


def _describe(spec: SyntheticSpec) -> dict[str, object]:
    seen = spec.signers - spec.held_out_signers
    names = [f"Signer{index + 1:02d}" for index in range(spec.signers)]
    streams = _world(spec)[2].streams
    return {"spec": asdict(spec), "streams": streams, "signers": names[:seen], "signers_unseen": names[seen:]}
