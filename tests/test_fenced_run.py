"""Every file of a run asks the fence: of a whole training and an evaluation, no rename goes without."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import trainer.memory.choice as choosing
from tests.conftest import TINY, reset_process
from tests.publishing import publish
from trainer.checkpoint.content import RunState
from trainer.checkpoint.store import CheckpointStore
from trainer.data.loader import StepShare
from trainer.distillation import RECORD
from trainer.errors import TrainingFailedError
from trainer.evaluate import main as evaluate
from trainer.files import FencedFolder
from trainer.job.directory import ATTEMPT, JOB, TOKEN, AttemptRecord, JobDirectory
from trainer.job.rank import Job
from trainer.memory.choice import MEMORY
from trainer.recipe import Recipe
from trainer.relief import EVENTS, Relief
from trainer.run_directory import record
from trainer.skips import NOT_FINITE, Skips
from trainer.step import StepOutcome
from trainer.train import main as train


def begin(run: Path, attempt: str) -> Job:
    directory = JobDirectory.of(run)
    directory.begin(AttemptRecord(attempt=attempt, began=time.time()))
    return Job(directory, attempt=attempt, token="t", end_time=None)


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """Undo what a run does to its process."""
    yield
    reset_process()


@pytest.fixture
def renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_process: None) -> set[str]:
    """What is renamed into the run by a process that is a rank of its job; each time the fence must be asked first."""
    run = tmp_path / "run"
    job = begin(run, "7.0")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ((JOB, str(job.directory.folder)), (ATTEMPT, "7.0"), (TOKEN, "t")):
        monkeypatch.setenv(name, value)
    found: set[str] = set()
    asked = [False]
    check, move = Job.check, os.replace

    def ask(self: Job) -> None:
        check(self)
        # A look at the fence for another reason is no question about a rename: before a line of metrics, once a second.
        caller = Path(sys._getframe(1).f_code.co_filename).name
        asked[0] = caller not in ("rank.py", "trackers.py")

    def watch(source: Any, target: Any, **options: Any) -> None:
        path = Path(target)
        of_run = path.is_relative_to(run) and not path.is_relative_to(run / "job")
        # What is written aside is published by the rename of its folder.
        if of_run and not path.parent.name.endswith(".tmp"):
            found.add(str(path.relative_to(run)))
            assert asked[0], f"{path} was renamed without asking the fence"
        # Moved aside for what follows at once: between the two, another look could only lose what was there.
        asked[0] = asked[0] and path.name.endswith(".replaced.tmp")
        move(source, target, **options)

    monkeypatch.setattr(Job, "check", ask)
    monkeypatch.setattr(os, "replace", watch)
    monkeypatch.setattr(os, "rename", watch)
    return found


def test_no_file_of_a_run_is_renamed_without_asking(
    corpus: Path, tmp_path: Path, renamed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    teacher = publish(tmp_path / "teacher", corpus, *TINY)
    monkeypatch.setattr(choosing, "is_limited", lambda device: True)
    flags = [
        "--data_dir",
        str(corpus),
        "--output_dir",
        str(run),
        "--num_workers",
        "0",
        *TINY,
        "--normalization",
        "none",
    ]
    flags += ["--max_steps", "4", "--evaluate_every", "2", "--teacher", str(teacher), "--warmup_epochs", "0"]
    assert train([*flags, "--stop_after_steps", "2"]) == 0
    reset_process()
    assert renamed >= {"recipe.yaml", "environment.json", RECORD, MEMORY, "checkpoints/last.json"}
    renamed.clear()
    assert train([*flags, "--resume", "auto"]) == 0
    reset_process()
    assert renamed >= {"environment.json", RECORD, "metrics.jsonl", "checkpoints/step-000000004"}
    renamed.clear()
    assert evaluate(["--checkpoint", str(run), "--split", "dev", "--num_workers", "0"]) == 0
    assert renamed == {f"evaluation/{name}" for name in ("dev.ctm", "dev.stm", "dev.json", ".probe.json")}


def relieve(folder: FencedFolder, job: Job) -> None:
    engine = SimpleNamespace(world_size=1, is_main=True, device=torch.device("cpu"), rung="")
    relief = Relief(cast(Any, engine), Recipe(), folder, [], lambda text: None)
    relief._record({"event": "out_of_memory"}, step=1, epoch=0)


def skip(folder: FencedFolder, job: Job) -> None:
    engine = SimpleNamespace(gather_objects=lambda item: [item], on_main=lambda function: function())
    skips = Skips(cast(Any, engine), cast(Any, SimpleNamespace(split=None)), folder, lambda text: None)
    outcome = cast(StepOutcome, SimpleNamespace(applied=False, overflowed=False, suspects=()))
    for _ in range(9):
        skips.note(cast(StepShare, None), outcome, RunState())
    try:
        skips.note(cast(StepShare, None), outcome, RunState())
    except TrainingFailedError as error:
        # The run gives up; whose run it is, is another matter.
        if "10 steps in a row" not in str(error):
            raise


def describe(folder: FencedFolder, job: Job) -> None:
    recipe = Recipe()
    recipe = replace(recipe, run=replace(recipe.run, output_dir=str(folder.path)))
    record(recipe, world_size=1, device="cpu", fence=folder.fence)


def go_back(folder: FencedFolder, job: Job) -> None:
    CheckpointStore(folder.path, keep=1, job=job).go_back_to(RunState(step=1), lambda text: None)


@pytest.mark.parametrize(
    ("act", "changed"),
    [
        (relieve, {EVENTS}),
        (skip, {NOT_FINITE}),
        (describe, {"recipe.yaml", "environment.json"}),
        (go_back, {f"checkpoints/{name}" for name in ("last.json", "passed-over-000000002/weights")}),
        (lambda folder, job: folder.clear(), set()),
    ],
)
def test_an_attempt_that_lost_the_run_changes_none_of_its_files(
    tmp_path: Path, act: Callable[[FencedFolder, Job], None], changed: set[str]
) -> None:
    def files() -> set[str]:
        found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        return {name for name in found if not name.startswith("job/")}

    job = begin(tmp_path, "7.0")
    for step in (1, 2):
        (folder := tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
        (folder / "weights").touch()
    (tmp_path / ".memory.json.0123456789ab.tmp").touch()
    begin(tmp_path, "7.1")
    before = files()
    with pytest.raises(TrainingFailedError, match=r"another attempt \(7.1\) has taken over"):
        act(FencedFolder(tmp_path, job.check), job)
    assert files() == before
    # The owner may.
    job = begin(tmp_path, "7.2")
    act(FencedFolder(tmp_path, job.check), job)
    assert files() - before == changed
    assert files() != before


def test_an_attempt_that_stood_still_before_its_rename_finds_nothing_to_rename(tmp_path: Path) -> None:
    old = begin(tmp_path, "7.0")

    def sleep() -> None:
        old.check()
        FencedFolder(tmp_path, begin(tmp_path, "7.1").check).clear()

    # Asked once more when there is nothing to rename: the reason is not a missing file.
    with pytest.raises(TrainingFailedError, match=r"another attempt \(7.1\) has taken over"):
        FencedFolder(tmp_path, sleep).write_json(MEMORY, {"budget": 1})
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
