"""Soft targets on a disk: shards of a fixed set of clips each, and a manifest that is written last.

Which clips make up a shard follows from the split alone. So any number of ranks can write them, another number can go
on after a kill, and no clip is ever written twice. A shard is a plain safetensors file, named by clip; it appears by
rename when it is complete, and its note beside it says what is in it. The manifest takes the notes' place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.manifest import MANIFEST as CHECKPOINT_MANIFEST
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError, name_some
from trainer.files import sync_file, write_json
from trainer.job.rank import NO_JOB, Job, NoJob
from trainer.softtargets.compression import Compression, Dtype

MANIFEST, UNDER_WAY = "manifest.json", "extraction.json"
_FORMAT = 1
_OPEN_SHARDS = 32
_IDENTITY = ("model.safetensors", "normalization.safetensors", "vocabulary.json")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """All that defines the bytes of soft targets."""

    teacher: str
    """Fingerprint of the checkpoint that they come from."""
    vocabulary: str
    """Fingerprint of its glosses in their order."""
    num_classes: int
    total_stride: int
    """Input frames per output frame."""
    split: str
    clips_hash: str
    files_hash: str
    precision: str
    """Precision of the teacher's forward pass."""
    dtype: Dtype
    top_k: int
    temperature: float
    """Temperature, besides 1, at which errors are measured; the targets themselves know none."""
    shard_clips: int

    @property
    def compression(self) -> Compression:
        """Return how frames are stored."""
        return Compression(dtype=self.dtype, top_k=self.top_k)


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """A clip of a shard: input frames, and the digest of its id, frames and glosses."""

    id: str
    frames: int
    digest: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A complete shard; `errors`: by compression, sums over frames of the divergence at temperature 1 and the other."""

    number: int
    bytes: int
    sha256: str
    clips: tuple[StoredClip, ...]
    outputs: int
    """Output frames."""
    errors: dict[str, tuple[float, float]]

    @property
    def name(self) -> str:
        """Return the file's name."""
        return f"shard-{self.number:05d}.safetensors"

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Shard:
        """Build it from a note."""
        clips = tuple(StoredClip(**clip) for clip in stored["clips"])
        errors = {name: (float(one), float(other)) for name, (one, other) in stored["errors"].items()}
        return cls(**{**stored, "clips": clips, "errors": errors})


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash what decides a checkpoint's outputs: weights, normalisation, vocabulary; not where it lies, nor its step."""
    files = json.loads((folder / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))["files"]
    return hashlib.sha256(json.dumps([files[name]["sha256"] for name in _IDENTITY]).encode()).hexdigest()


class ShardFolder:
    """The folder while targets are being extracted."""

    def __init__(self, folder: Path, job: Extraction, owner: Job | NoJob = NO_JOB) -> None:
        """Take the folder of an extraction; `owner` is the launched job that may write there."""
        self.folder, self.job, self.owner = folder, job, owner

    def claim(self) -> bool:
        """Begin, or go on with what was begun; tell whether it is complete already. Rank 0 alone.

        Raises `InputError` if the folder holds the targets of another extraction, naming every difference.
        """
        self.owner.check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / (MANIFEST if (self.folder / MANIFEST).exists() else UNDER_WAY)
            if path.exists():
                self._check_same(path)
                for leftover in self.folder.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
            elif any(not entry.name.startswith(".") and entry.name != "job" for entry in self.folder.iterdir()):
                raise InputError(
                    f"{self.folder}: holds something else than soft targets; choose another --output, or empty it"
                )
            else:
                content = {"format": _FORMAT, "extraction": dataclasses.asdict(self.job)}
                write_json(path, content, fence=self.owner.check)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}); choose another --output") from error
        return path.name == MANIFEST

    def find(self, number: int) -> Shard | None:
        """Return a shard that was written in full, every byte of it compared with its note; None if there is none."""
        note = self._note(number)
        try:
            shard = Shard.from_json(json.loads(note.read_text(encoding="utf-8")))
            path = self.folder / shard.name
            return shard if shard.number == number and _sha256(path) == shard.sha256 else None
        except (OSError, ValueError, KeyError, TypeError):
            # Not there, or cut short with the machine: it is extracted again.
            return None

    def write(
        self,
        number: int,
        clips: list[StoredClip],
        tensors: list[dict[str, Tensor]],
        errors: dict[str, tuple[float, float]],
    ) -> None:
        """Write a shard aside, rename it into place, and then its note."""
        name = f"shard-{number:05d}.safetensors"
        temporary = self.folder / f".{name}.{self.job.teacher[:8]}{self.owner.tag}.tmp"
        flat = {
            f"{clip.id}/{part}": value for clip, own in zip(clips, tensors, strict=True) for part, value in own.items()
        }
        try:
            save_file(flat, temporary)
            sync_file(temporary)
            shard = Shard(
                number=number,
                bytes=temporary.stat().st_size,
                sha256=_sha256(temporary),
                clips=tuple(clips),
                outputs=sum(len(own["log_probs"]) for own in tensors),
                errors=errors,
            )
            self.owner.check()
            temporary.replace(self.folder / name)
            write_json(self._note(number), dataclasses.asdict(shard), fence=self.owner.check)
        except (OSError, SafetensorError) as error:
            # The next attempt removes what its predecessors were writing: that is no trouble with the disk.
            self.owner.check()
            raise InputError(
                f"{self.folder}: {name} cannot be written ({error}); free space or mend the rights, then run the same "
                "command again: it goes on where it was"
            ) from error

    def publish(self, count: int, vocabulary: Vocabulary, facts: dict[str, Any]) -> None:
        """Write the manifest of all shards, and remove what stood in for it."""
        shards = [self.find(number) for number in range(count)]
        missing = [f"shard-{number:05d}" for number, shard in enumerate(shards) if shard is None]
        if missing:
            raise InputError(
                f"{self.folder}: rank 0 does not find {name_some(missing)}, which other ranks wrote; choose an "
                "--output that all machines share"
            )
        ids = [clip.id for shard in shards if shard for clip in shard.clips]
        if len(set(ids)) != len(ids):
            raise AssertionError("soft targets must hold each clip once")
        manifest = {
            "format": _FORMAT,
            "extraction": dataclasses.asdict(self.job),
            "values": "log-probabilities at temperature 1",
            **facts,
            "glosses": vocabulary.glosses,
            "shards": [dataclasses.asdict(shard) for shard in shards if shard],
        }
        write_json(self.folder / MANIFEST, manifest, fence=self.owner.check)
        for number in range(count):
            self._note(number).unlink(missing_ok=True)
        (self.folder / UNDER_WAY).unlink(missing_ok=True)

    def _note(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.json"

    def _check_same(self, path: Path) -> None:
        stored = _read_json(path)["extraction"]
        asked = dataclasses.asdict(self.job)
        changed = [name for name in asked if stored.get(name) != asked[name]]
        if not changed:
            return
        words = {"teacher": "another teacher", "vocabulary": "another vocabulary", "clips_hash": "other clips"}
        words |= {"files_hash": "features that have changed since"}
        found = ", ".join(
            words.get(name, f"{name} {stored.get(name)!r} instead of {asked[name]!r}") for name in changed
        )
        raise InputError(
            f"{self.folder}: holds soft targets of {found}; choose another --output, or delete that folder"
        )


class SoftTargets:
    """Complete soft targets, read clip by clip from mapped shards."""

    def __init__(self, folder: Path) -> None:
        """Open a folder; raises `InputError` if its extraction is not complete, or a shard has another size."""
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            begun = (folder / UNDER_WAY).is_file()
            raise InputError(
                f"{folder}: the extraction of these soft targets has not ended; run the same trainer.extract again"
                if begun
                else f"{folder}: expected soft targets, found no {MANIFEST}; make them with python -m trainer.extract"
            )
        content = _read_json(path)
        try:
            if content["format"] != _FORMAT:
                raise InputError(f"{path}: has format {content['format']}, this version reads {_FORMAT}; extract anew")
            self.job = Extraction(**content["extraction"])
            self.vocabulary = Vocabulary(content["glosses"])
            self.shards = [Shard.from_json(shard) for shard in content["shards"]]
            self.facts: dict[str, Any] = {name: content[name] for name in ("teacher_wer", "protocol")}
            if (
                self.vocabulary.fingerprint != self.job.vocabulary
                or list(self.vocabulary.glosses) != content["glosses"]
            ):
                raise ValueError("its glosses are not those of the teacher, or in another order")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: is no manifest of soft targets ({error}); extract them anew") from error
        self.places = {clip.id: (shard, clip) for shard in self.shards for clip in shard.clips}
        self._open: OrderedDict[int, Any] = OrderedDict()
        problems = [
            f"{folder / shard.name}: expected {shard.bytes} bytes, found {_size(folder / shard.name)}; extract anew"
            for shard in self.shards
            if _size(folder / shard.name) != shard.bytes
        ]
        if problems:
            raise InputError(problems[:10])

    def check(self, rank: int, world_size: int) -> None:
        """Compare this rank's share of the shards with their checksums."""
        problems = [
            f"{self.folder / shard.name}: its checksum is not the one written with it; extract the soft targets anew"
            for shard in self.shards[rank::world_size]
            if _sha256(self.folder / shard.name) != shard.sha256
        ]
        if problems:
            raise InputError(problems[:10])

    def log_probs(self, clip_id: str) -> Tensor:
        """Return a clip's log-probabilities `[F, V]` at temperature 1, float32."""
        shard, _ = self.places[clip_id]
        file = self._open.get(shard.number)
        if file is None:
            file = safe_open(self.folder / shard.name, framework="pt")
            self._open[shard.number] = file
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard.number)
        names = ("log_probs", "classes") if self.job.top_k else ("log_probs",)
        return self.job.compression.restore(
            {name: file.get_tensor(f"{clip_id}/{name}") for name in names}, self.job.num_classes
        )


def totals(shards: list[Shard]) -> tuple[int, int, dict[str, tuple[float, float]]]:
    """Return the clips, output frames and mean errors per frame of all shards."""
    outputs = sum(shard.outputs for shard in shards)
    errors: dict[str, tuple[float, float]] = {}
    for shard in shards:
        for name, (one, other) in shard.errors.items():
            before = errors.get(name, (0.0, 0.0))
            errors[name] = before[0] + one / outputs, before[1] + other / outputs
    return sum(len(shard.clips) for shard in shards), outputs, errors


def stand_in(frames: int, num_classes: int, device: torch.device) -> Tensor:
    """Return targets for clips that nobody has seen: all classes alike."""
    return torch.zeros(frames, num_classes, device=device).log_softmax(dim=-1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["extraction"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend the rights, or extract anew") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is damaged ({error}); delete the folder and extract the soft targets anew"
        ) from error
    return content


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
