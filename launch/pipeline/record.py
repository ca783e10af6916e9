"""RUN/job/stage.json: which stage of which pipeline a job is, what it needs and what waits for it.

Read by the batch job too, so that it imports nothing but the job directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.files import write_json
from trainer.job.directory import JobDirectory

STAGE, GIVEN = "stage.json", "given.json"


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage, as it was started."""

    pipeline: str
    """The file it stands in."""
    stage: str
    """Its name there."""
    command: str
    """Sub-command of signscale."""
    fingerprint: str
    """Hash of what defines its result."""
    content: dict[str, Any]
    """What defines its result."""
    output: str | None
    """Folder or file it leaves behind."""
    needs: dict[str, str] = field(default_factory=dict)
    """Job folders of the stages that have to be done before, by name."""
    reads: list[str] = field(default_factory=list)
    """Those of them whose output it works from."""
    children: dict[str, str] = field(default_factory=dict)
    """Job folders of the stages that need this one, by name."""

    def save(self, job: JobDirectory) -> None:
        """Write stage.json."""
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / STAGE, dataclasses.asdict(self))

    @classmethod
    def load(cls, job: JobDirectory) -> StageRecord | None:
        """Read stage.json; None for a job that is no stage. Raises `InputError` for a damaged one."""
        path = job.folder / STAGE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete it, and type the pipeline again") from error


def identity(job: JobDirectory, command: str, output: str | None) -> str | None:
    """Name what a stage left behind; None where it is not done.

    By content where a manifest lists the hashes, so that a run that was merely launched once more is the same; else by
    the attempt that did it.
    """
    word = job.last_word()
    if word is None or word.word != "DONE":
        return None
    manifest = _manifest(command, output)
    return word.attempt if manifest is None else hashlib.sha256(manifest.read_bytes()).hexdigest()


def _manifest(command: str, output: str | None) -> Path | None:
    if output is None or command not in ("train", "extract", "pack"):
        return None
    found = Path(output) / "manifest.json"
    if command == "train":
        pointers = [Path(output) / "checkpoints" / f"{name}.json" for name in ("best", "last")]
        pointer = next((path for path in pointers if path.is_file()), None)
        if pointer is None:
            return None
        try:
            found = pointer.parent / json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"] / "manifest.json"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{pointer}: is damaged ({error}); resume the run") from error
    return found if found.is_file() else None


def find_lacking(job: JobDirectory) -> list[str]:
    """List what a stage still lacks; nothing where the job is no stage of a pipeline."""
    record = StageRecord.load(job)
    needs = {} if record is None else record.needs
    states = {name: _state(JobDirectory(Path(folder))) for name, folder in needs.items()}
    return [f"stage {name} {state}" for name, state in states.items() if state is not None]


def _state(job: JobDirectory) -> str | None:
    """Say why what needs this job cannot begin; None where it can."""
    word = job.last_word()
    if word is not None and word.word == "DONE":
        return None if word.code == 0 else f"is done, but not as well as was asked for: {word.reason}"
    if word is not None and word.word == "FAILED":
        return f"failed: {word.reason}"
    if word is not None:
        return f"is not done yet: {word.reason}"
    deeper = find_lacking(job)
    if deeper:
        return f"was not begun, since {'; '.join(deeper)}"
    attempts = job.history()
    if attempts and attempts[-1].word == "DONE":
        return "is to be done again"
    if attempts and attempts[-1].ended is not None:
        return f"is not done: {attempts[-1].reason or 'its last attempt left no word'}"
    return "is not done yet" if attempts else "has not been started"


def begin(job: JobDirectory) -> str | None:
    """Let a stage begin, and record what it works from; otherwise return why it may not."""
    lacking = find_lacking(job)
    record = StageRecord.load(job)
    if lacking:
        return f"not begun: {'; '.join(lacking)}"
    if record is None:
        return None
    given = {}
    for name in record.needs:
        parent = JobDirectory(Path(record.needs[name]))
        known = StageRecord.load(parent)
        given[name] = identity(parent, known.command if known else "train", known.output if known else None)
    write_json(job.folder / GIVEN, given)
    return None


def read_given(job: JobDirectory) -> dict[str, str | None] | None:
    """Read what a stage worked from when it was last begun; None where that is not known."""
    path = job.folder / GIVEN
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it, and the stage is done again") from error
