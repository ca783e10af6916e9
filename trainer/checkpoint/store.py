"""The checkpoints of a run: publishing, finding, pruning."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from trainer.checkpoint.content import Checkpoint, RunState
from trainer.checkpoint.manifest import MANIFEST, find_damage, write_manifest
from trainer.errors import InputError
from trainer.files import FencedFolder, sync_folder
from trainer.job.rank import NO_JOB, Job, NoJob

_NAME = re.compile(r"step-(\d{9})")
_GONE = ".gone.tmp"


class CheckpointStore:
    """The folder `checkpoints/` of a run; only rank 0 of the attempt that owns the run writes to it."""

    def __init__(self, run_dir: Path, *, keep: int, job: Job | NoJob = NO_JOB) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep, self.job = keep, job
        self._files = FencedFolder(self.folder, job.check)

    def publish(self, checkpoint: Checkpoint, *, is_best: bool) -> Path:
        """Write a checkpoint aside, checksum it, rename it into place, point to it, and only then prune.

        A crash at any point leaves the previous checkpoints and their pointers whole. Raises `InputError` if the disk
        is full or not writable, `TrainingFailedError` if another attempt owns the run: nothing is published then.
        """
        try:
            return self._publish(checkpoint, is_best=is_best)
        except (OSError, SafetensorError) as error:
            # The next attempt removes what its predecessors were writing: that is no trouble with the disk.
            self.job.check()
            raise InputError(
                f"{self.folder}: checkpoint of step {checkpoint.state.step} cannot be written ({error}); free space or "
                "mend the rights, then go on with --resume auto"
            ) from error

    def _publish(self, checkpoint: Checkpoint, *, is_best: bool) -> Path:
        final = self.folder / f"step-{checkpoint.state.step:09d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{final.name}{self.job.tag}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        checkpoint.write(temporary)
        write_manifest(temporary)
        replaced = self.folder / f".{final.name}{self.job.tag}.replaced.tmp"
        self.job.check()
        if final.exists():
            # The same step, saved again; the old one stays readable until the new one is complete.
            final.replace(replaced)
        temporary.replace(final)
        shutil.rmtree(replaced, ignore_errors=True)
        sync_folder(self.folder)
        self._point("last", checkpoint.state.step)
        if is_best:
            self._point("best", checkpoint.state.step, checkpoint.state.best)
        self._prune()
        return final

    def steps(self) -> list[int]:
        """List the steps of all published checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def newest_sound(self, log: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint whose every byte is right; say which ones are passed over, and why."""
        for step in self.steps():
            path = self.folder / f"step-{step:09d}"
            damage = find_damage(path)
            if damage is None:
                return path
            log(f"warning: {damage}; passing over this checkpoint to the one before")
        return None

    def go_back_to(self, state: RunState, log: Callable[[str], None]) -> bool:
        """Make the folder what it was when `state` was saved, so that no pointer leads past it.

        Checkpoints after it are renamed, not deleted, and leftovers of a broken attempt go. Returns whether the best
        checkpoint of `state` is still there.
        """
        if not self.folder.is_dir():
            return False
        for step in (step for step in self.steps() if step > state.step):
            name, aside = f"step-{step:09d}", f"passed-over-{step:09d}"
            log(f"the run goes on from step {state.step}: checkpoint {name} is set aside as {aside}")
            self.job.check()
            shutil.rmtree(self.folder / aside, ignore_errors=True)
            self._files.rename(name, aside)
        for leftover in self.folder.glob(".step-*.tmp"):
            log(f"removing {leftover.name}: an attempt ended while writing it")
            self._remove(leftover)
        self._files.clear()
        for pointer in ("best.json", "last.json"):
            self._files.remove(pointer)
        steps = self.steps()
        if state.best_step in steps:
            self._point("best", state.best_step, state.best)
        if state.step in steps:
            self._point("last", state.step)
        return state.best_step in steps

    def _point(self, name: str, step: int | None, value: float | None = None) -> None:
        self._files.write_json(f"{name}.json", {"checkpoint": f"step-{step:09d}", "value": value})

    def _prune(self) -> None:
        pointers = (self.folder / name for name in ("best.json", "last.json"))
        named = {json.loads(path.read_text())["checkpoint"] for path in pointers if path.exists()}
        for step in self.steps()[self.keep :]:
            if f"step-{step:09d}" not in named:
                self.job.check()
                shutil.rmtree(self.folder / f"step-{step:09d}")

    def _remove(self, leftover: Path) -> None:
        """Take a folder away from whoever may still be writing into it: under its name, nothing can be published."""
        gone = leftover if leftover.name.endswith(_GONE) else leftover.with_name(leftover.name + _GONE)
        self._files.rename(leftover.name, gone.name)
        # A file that another machine holds open keeps a network's file system from removing the folder: next time.
        shutil.rmtree(gone, ignore_errors=True)


def run_folder_of(checkpoint: Path) -> Path:
    """Return the run directory that a checkpoint folder belongs to; of one outside a run, the folder it lies in."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def find_checkpoint(path: Path, *, prefer: str = "best") -> Path:
    """Return the checkpoint folder that a user means.

    `path` is a checkpoint, a run (its best checkpoint, else its last), or RUN/checkpoints/best or /last. Raises
    `InputError` if there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    candidates = [folder / f"{name}.json" for name in dict.fromkeys((prefer, "last"))]
    if path.name in ("best", "last") and folder == path:
        candidates = [path.with_name(f"{path.name}.json")]
    for pointer in candidates:
        if pointer.is_file():
            try:
                name = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{pointer}: is damaged; name a checkpoint folder step-… instead") from None
            return pointer.parent / str(name)
    raise InputError(
        f"{path}: expected a run directory or a checkpoint, found none; a run keeps its checkpoints in "
        "RUN/checkpoints/step-…"
    )
