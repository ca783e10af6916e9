"""The fence: an attempt that lost its run changes nothing in it, whenever it wakes up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.checkpoint import store
from trainer.checkpoint.content import Checkpoint, RunState
from trainer.checkpoint.store import CheckpointStore
from trainer.data.normalization import Normalization
from trainer.data.vocabulary import Vocabulary
from trainer.errors import TrainingFailedError
from trainer.files import FencedFolder
from trainer.job.directory import AttemptRecord, JobDirectory
from trainer.job.rank import Job
from trainer.observe.trackers import METRICS, JsonLines
from trainer.recipe import Recipe
from trainer.softtargets.store import Extraction, ShardFolder, StoredClip


def begin(run: Path, attempt: str) -> Job:
    directory = JobDirectory.of(run)
    directory.begin(AttemptRecord(attempt=attempt, began=time.time()))
    return Job(directory, attempt=attempt, token="t", end_time=None)


def publish(checkpoints: CheckpointStore, step: int) -> None:
    ones = np.ones(2, np.float32)
    checkpoint = Checkpoint(
        recipe=Recipe(),
        vocabulary=Vocabulary(["WETTER"]),
        normalization=Normalization(kind="corpus", mean=ones, scale=ones),
        state=RunState(step=step, best=0.5, best_step=step),
        model={"weight": torch.full((3,), float(step))},
        optimizer={},
    )
    checkpoints.publish(checkpoint, is_best=True)


def published(folder: Path) -> dict[str, bytes]:
    """All files but those that nobody reads."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: content for name, content in files.items() if not name.startswith(".")}


@pytest.fixture
def old(tmp_path: Path) -> CheckpointStore:
    """The checkpoints of an attempt that has published one."""
    checkpoints = CheckpointStore(tmp_path, keep=1, job=begin(tmp_path, "7.0"))
    publish(checkpoints, 1)
    return checkpoints


@pytest.mark.parametrize("moment", ["write_manifest", "sync_folder"])
def test_an_attempt_that_loses_the_run_while_it_saves_publishes_nothing_more(
    old: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    real: Callable[..., None] = getattr(store, moment)
    at_takeover: dict[str, bytes] = {}

    def lose(*arguments: Any) -> None:
        real(*arguments)
        begin(tmp_path, "7.1")
        at_takeover.update(published(old.folder))

    monkeypatch.setattr(store, moment, lose)
    with pytest.raises(TrainingFailedError, match=r"another attempt \(7.1\) has taken over"):
        publish(old, 2)
    # The second moment lies behind the checkpoint's rename: pointers stay, and nothing is pruned.
    assert published(old.folder) == at_takeover
    assert json.loads((old.folder / "last.json").read_text())["checkpoint"] == "step-000000001"


def test_an_attempt_that_slept_through_the_check_finds_nothing_to_rename(
    old: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    asked = 0
    check = old.job.check

    def sleep_after_the_check() -> None:
        nonlocal asked
        check()
        asked += 1
        if asked == 1:
            new = CheckpointStore(tmp_path, keep=1, job=begin(tmp_path, "7.1"))
            new.go_back_to(RunState(step=1, best_step=1), said.append)

    monkeypatch.setattr(old.job, "check", sleep_after_the_check)
    with pytest.raises(TrainingFailedError, match=r"another attempt \(7.1\) has taken over"):
        publish(old, 2)
    assert old.steps() == [1]
    assert said == ["removing .step-000000002.7.0.tmp: an attempt ended while writing it"]
    assert not list(old.folder.glob(".*"))


def test_attempts_write_aside_under_names_of_their_own(
    old: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, one of them cut off, may save the same step at once."""
    names: list[str] = []
    real = store.write_manifest

    def watch(folder: Path) -> None:
        names.append(folder.name)
        real(folder)

    monkeypatch.setattr(store, "write_manifest", watch)
    publish(old, 2)
    publish(CheckpointStore(tmp_path, keep=1, job=begin(tmp_path, "7.1")), 2)
    assert len(set(names)) == 2


def test_no_line_of_metrics_is_added(tmp_path: Path) -> None:
    job = begin(tmp_path, "7.0")
    lines = JsonLines(FencedFolder(tmp_path, job.check), after_step=-1)
    lines.log({"step": 1, "epoch": 0})
    begin(tmp_path, "7.1")
    with pytest.raises(TrainingFailedError, match="taken over"):
        lines.log({"step": 2, "epoch": 0})
    with pytest.raises(TrainingFailedError, match="taken over"):
        JsonLines(FencedFolder(tmp_path, job.check), after_step=0)
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1]


def extraction() -> Extraction:
    return Extraction(
        teacher="ab" * 32,
        vocabulary=Vocabulary(["WETTER"]).fingerprint,
        num_classes=2,
        total_stride=4,
        split="train",
        clips_hash="c",
        files_hash="f",
        precision="no",
        dtype="float32",
        top_k=0,
        temperature=3.0,
        shard_clips=1,
    )


def write_shard(shards: ShardFolder, number: int) -> None:
    clip = StoredClip(id=f"clip_{number}", frames=4, digest=number)
    shards.write(number, [clip], [{"log_probs": torch.zeros(1, 2)}], {"float32": (0.0, 0.0)})


def test_soft_targets_are_fenced_shard_by_shard_and_as_a_whole(tmp_path: Path) -> None:
    old = ShardFolder(tmp_path / "targets", extraction(), begin(tmp_path, "7.0"))
    assert not old.claim()
    write_shard(old, 0)
    new = ShardFolder(tmp_path / "targets", extraction(), begin(tmp_path, "7.1"))
    assert not new.claim()
    before = published(old.folder)
    for act in (
        lambda: write_shard(old, 1),
        lambda: old.publish(1, Vocabulary(["WETTER"]), {}),
        old.claim,
    ):
        with pytest.raises(TrainingFailedError, match=r"another attempt \(7.1\) has taken over"):
            act()
    assert published(old.folder) == before
    write_shard(new, 1)
    assert new.find(1) is not None
