"""Checkpoints: the same bits come back or nothing does, and no crash costs more than the checkpoint in the making."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer
from trainer import files
from trainer.checkpoint import content, store
from trainer.checkpoint.content import Checkpoint, RunState, read_checkpoint
from trainer.checkpoint.manifest import MANIFEST, find_damage, write_manifest
from trainer.checkpoint.store import CheckpointStore, find_checkpoint
from trainer.data.normalization import Normalization
from trainer.data.vocabulary import Vocabulary
from trainer.errors import InputError
from trainer.recipe import CorpusRecipe, OptimizationRecipe, Recipe

FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "recipe.yaml",
    "vocabulary.json",
    "normalization.safetensors",
]


def make_checkpoint(step: int = 10, *, best: float | None = 0.1, best_step: int | None = None) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    model = {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "layer.half": torch.randn(5, generator=generator).bfloat16(),
        # Values that a detour over text or another precision would lose.
        "layer.odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 1 / 3]),
        "counter": torch.tensor(step),
    }
    return Checkpoint(
        recipe=Recipe(
            corpus=CorpusRecipe(data_dir="some where/ä"), optimization=OptimizationRecipe(learning_rate=1 / 3)
        ),
        vocabulary=Vocabulary(["WETTER", "ÜBER", "WIND"]),
        normalization=Normalization(
            kind="corpus", mean=np.array([0.1, 1 / 3], np.float32), scale=np.array([1e-30, 3], np.float32)
        ),
        state=RunState(
            step=step,
            epoch=2,
            position=7,
            best=best,
            best_step=step if best_step is None else best_step,
            window={"loss": 1 / 3, "steps": 2.0},
            clips_hash="ab" * 32,
            world_size=3,
        ),
        model=model,
        optimizer={"layer.weight/exp_avg": torch.randn(3, 4), "layer.weight/step": torch.tensor(float(step))},
    )


def write(folder: Path, checkpoint: Checkpoint | None = None) -> Path:
    folder.mkdir(parents=True)
    (checkpoint or make_checkpoint()).write(folder)
    write_manifest(folder)
    return folder


def publish(checkpoints: CheckpointStore, step: int, *, best_step: int | None = None) -> Path:
    """Publish a step; it is the best one unless an earlier `best_step` is named."""
    best_step = step if best_step is None else best_step
    checkpoint = make_checkpoint(step, best=1.0 / best_step, best_step=best_step)
    return checkpoints.publish(checkpoint, is_best=best_step == step)


def go_on(checkpoints: CheckpointStore, said: list[str] | None = None) -> bool:
    """Do what a resumed run does with the folder; return whether its best checkpoint is still there."""
    log = [].append if said is None else said.append
    newest = checkpoints.newest_sound(log)
    assert newest is not None
    return checkpoints.go_back_to(read_checkpoint(newest).state, log)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.contiguous().reshape(-1).view(torch.uint8).equal(other[name].reshape(-1).view(torch.uint8))
        for name, value in one.items()
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Round trip.


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    loaded = read_checkpoint(write(tmp_path / "c", checkpoint))
    assert same_bits(checkpoint.model, loaded.model)
    assert same_bits(checkpoint.optimizer, loaded.optimizer)
    assert loaded.recipe == checkpoint.recipe
    assert loaded.vocabulary == checkpoint.vocabulary
    assert loaded.normalization.kind == "corpus"
    np.testing.assert_array_equal(loaded.normalization.mean, checkpoint.normalization.mean)
    np.testing.assert_array_equal(loaded.normalization.scale, checkpoint.normalization.scale)
    assert loaded.state == checkpoint.state


@pytest.mark.parametrize("best", [None, 0.0, 1 / 3, math.inf])
def test_the_state_keeps_every_value_of_its_best(tmp_path: Path, best: float | None) -> None:
    assert read_checkpoint(write(tmp_path / "c", make_checkpoint(best=best))).state.best == best


def test_the_optimizer_can_be_left_unread_but_is_checked_all_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    assert read_checkpoint(folder, with_optimizer=False).optimizer == {}
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"optimizer\.safetensors"):
        read_checkpoint(folder, with_optimizer=False)


def test_an_optimizer_without_tensors_can_be_kept(tmp_path: Path) -> None:
    # Plain SGD has none before its first step.
    checkpoint = make_checkpoint()
    plain = Checkpoint(**{**{name: getattr(checkpoint, name) for name in vars(checkpoint)}, "optimizer": {}})
    assert read_checkpoint(write(tmp_path / "c", plain)).optimizer == {}


def test_a_checkpoint_is_these_files_and_the_manifest_names_all_of_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST])
    assert sorted(json.loads((folder / MANIFEST).read_text())["files"]) == sorted(FILES)


# Damage.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.37, 0.999])
def test_a_flipped_byte_is_refused_and_the_file_named(tmp_path: Path, name: str, where: float) -> None:
    path = write(tmp_path / "c") / name
    content_ = bytearray(path.read_bytes())
    content_[int(where * len(content_))] ^= 1
    path.write_bytes(content_)
    assert str(path) in str(find_damage(tmp_path / "c"))
    with pytest.raises(InputError, match=rf"{name}.*refused"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_refused_and_named(tmp_path: Path, name: str, keep: float) -> None:
    path = write(tmp_path / "c") / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=rf"{name}.*refused"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_refused_and_named(tmp_path: Path, name: str) -> None:
    (write(tmp_path / "c") / name).unlink()
    with pytest.raises(InputError, match=rf"{name}.*refused"):
        read_checkpoint(tmp_path / "c")


def test_a_flipped_bit_of_the_manifest_itself_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "c") / MANIFEST
    sound = path.read_bytes()
    for place in range(len(sound) - 1):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert find_damage(tmp_path / "c") is not None, (place, bytes(damaged))


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"format": 1, "files": []}', '{"format": 1, "files": {"a": 1}}'])
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    (write(tmp_path / "c") / MANIFEST).write_text(text)
    assert "is no manifest" in str(find_damage(tmp_path / "c"))


def test_a_manifest_that_lacks_a_file_of_every_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c") / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"]["model.safetensors"]
    path.write_text(json.dumps(manifest))
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path / "c")


def test_a_checkpoint_of_another_format_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "c") / MANIFEST
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert "has format 2, this version reads 1" in str(find_damage(tmp_path / "c"))


def test_a_state_of_another_version_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "moon_phase": 3}))
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    with pytest.raises(InputError, match="another version"):
        read_checkpoint(folder)


# Publishing and pruning.


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=2)
    for step, best_step in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2)]:
        publish(checkpoints, step, best_step=best_step)
    assert checkpoints.steps() == [5, 4, 2]
    publish(checkpoints, 6)
    assert checkpoints.steps() == [6, 5]
    assert find_checkpoint(tmp_path).name == "step-000000006"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_as_asked_are_kept_and_all_of_them_sound(tmp_path: Path, keep: int) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=keep)
    for step in range(1, 8):
        publish(checkpoints, step, best_step=1)
        # Whatever is deleted, the one just published and the best one are there.
        assert checkpoints.steps()[0] == step
        assert checkpoints.steps()[-1] == 1
    assert len(checkpoints.steps()) == keep + 1
    for step in checkpoints.steps():
        assert find_damage(checkpoints.folder / f"step-{step:09d}") is None


def test_pointers_name_the_last_and_the_best(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=5)
    publish(checkpoints, 4)
    publish(checkpoints, 8, best_step=4)
    assert json.loads((checkpoints.folder / "last.json").read_text())["checkpoint"] == "step-000000008"
    best = json.loads((checkpoints.folder / "best.json").read_text())
    assert best == {"checkpoint": "step-000000004", "value": 0.25}


def crash(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def crash_in_pointer(name: str) -> Callable[[Path, Any], None]:
    real = files.write_json

    def write_or_crash(path: Path, value: Any, **more: Any) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        real(path, value, **more)

    return write_or_crash


@pytest.mark.parametrize(
    ("module", "function"),
    [(content, "save_file"), (content, "dump_recipe"), (content, "write_json"), (store, "write_manifest")],
)
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_while_writing_leaves_checkpoints_and_pointers_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str, keep: int
) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=keep)
    publish(checkpoints, 1)
    publish(checkpoints, 2, best_step=1)
    before = snapshot(checkpoints.folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, crash)
        with pytest.raises(KeyboardInterrupt):
            publish(checkpoints, 3)
    after = snapshot(checkpoints.folder)
    assert {name: after.get(name) for name in before} == before
    assert checkpoints.steps() == [2, 1]
    assert checkpoints.newest_sound(print) == checkpoints.folder / "step-000000002"
    # The next attempt clears the leftovers away and publishes as if nothing had been.
    said: list[str] = []
    assert checkpoints.go_back_to(read_checkpoint(checkpoints.folder / "step-000000002").state, said.append)
    assert [line for line in said if "an attempt ended while writing it" in line]
    assert snapshot(checkpoints.folder).keys() == before.keys()
    publish(checkpoints, 3)
    assert checkpoints.steps()[0] == 3


def test_a_run_that_is_to_keep_fewer_deletes_none_before_the_next_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        publish(CheckpointStore(tmp_path, keep=3), step)
    fewer = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(store, "sync_folder", crash)
        with pytest.raises(KeyboardInterrupt):
            publish(fewer, 4)
    assert fewer.steps() == [4, 3, 2, 1]
    publish(fewer, 5)
    assert fewer.steps() == [5]


@pytest.mark.parametrize("pointer", ["last.json", "best.json"])
def test_a_crash_between_publishing_and_pointing_loses_neither_the_new_nor_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointer: str
) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=1)
    publish(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", crash_in_pointer(pointer))
        with pytest.raises(KeyboardInterrupt):
            publish(checkpoints, 2)
    assert checkpoints.steps() == [2, 1]
    assert checkpoints.newest_sound(print) == checkpoints.folder / "step-000000002"
    for prefer in ("best", "last"):
        assert find_damage(find_checkpoint(tmp_path, prefer=prefer)) is None


@pytest.mark.parametrize("pointer", ["last.json", "best.json"])
def test_the_best_checkpoint_survives_a_crash_before_it_was_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointer: str
) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=1)
    publish(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", crash_in_pointer(pointer))
        with pytest.raises(KeyboardInterrupt):
            publish(checkpoints, 2)
    # The run goes on from step 2, whose state says that step 2 is the best, and finds nothing better.
    assert go_on(checkpoints)
    for step in (3, 4):
        publish(checkpoints, step, best_step=2)
    assert find_checkpoint(tmp_path, prefer="best").name == "step-000000002"
    assert find_damage(find_checkpoint(tmp_path, prefer="best")) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_full_disk_is_reported_and_costs_nothing_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=1)
    publish(checkpoints, 1)
    before = snapshot(checkpoints.folder)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(store, "write_manifest", fail)
    with pytest.raises(InputError, match=rf"step 2 cannot be written .*{error.strerror}.*--resume auto"):
        publish(checkpoints, 2)
    after = snapshot(checkpoints.folder)
    assert {name: after.get(name) for name in before} == before


# Going on.


def test_the_newest_sound_checkpoint_is_found_and_the_damaged_ones_are_named(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=9)
    for step in (1, 2, 3, 4):
        publish(checkpoints, step)
    flipped = checkpoints.folder / "step-000000004" / "model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    (checkpoints.folder / "step-000000003" / "state.json").unlink()
    said: list[str] = []
    assert checkpoints.newest_sound(said.append) == checkpoints.folder / "step-000000002"
    assert len(said) == 2
    assert "step-000000004/model.safetensors" in said[0]
    assert "step-000000003/state.json" in said[1]
    assert all("passing over" in line for line in said)


def test_without_any_sound_checkpoint_there_is_none(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=2)
    assert checkpoints.newest_sound(print) is None
    (publish(checkpoints, 1) / MANIFEST).unlink()
    assert checkpoints.newest_sound(lambda _: None) is None


def test_going_back_sets_aside_what_is_newer_and_points_to_what_was_best_then(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=9)
    for step, best_step in [(1, 1), (2, 2), (3, 2), (4, 4)]:
        publish(checkpoints, step, best_step=best_step)
    (checkpoints.folder / "step-000000004" / "state.json").unlink()
    said: list[str] = []
    assert go_on(checkpoints, said)
    assert checkpoints.steps() == [3, 2, 1]
    assert any("step-000000004" in line and "set aside" in line for line in said)
    # Set aside, not deleted: it may be all that is left of days of work.
    assert (checkpoints.folder / "passed-over-000000004" / "model.safetensors").is_file()
    assert find_checkpoint(tmp_path, prefer="best").name == "step-000000002"
    assert find_checkpoint(tmp_path, prefer="last").name == "step-000000003"


def test_going_back_behind_the_best_checkpoint_that_was_pruned_says_so(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=2)
    for step, best_step in [(1, 1), (2, 1), (3, 3)]:
        publish(checkpoints, step, best_step=best_step)
    (checkpoints.folder / "step-000000003" / "state.json").unlink()
    # Step 2 remembers step 1 as the best, which went when step 3 became it.
    assert not go_on(checkpoints)
    assert checkpoints.steps() == [2]
    assert find_checkpoint(tmp_path).name == "step-000000002"


def test_going_back_to_the_beginning_leaves_no_pointer_that_leads_nowhere(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=2)
    (publish(checkpoints, 1) / MANIFEST).unlink()
    assert not checkpoints.go_back_to(RunState(), lambda _: None)
    for prefer in ("best", "last"):
        with pytest.raises(InputError, match="expected a run directory or a checkpoint"):
            find_checkpoint(tmp_path, prefer=prefer)


def test_a_new_run_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    assert not CheckpointStore(tmp_path / "run", keep=2).go_back_to(RunState(), print)
    assert not (tmp_path / "run").exists()


def test_names_are_ordered_by_number(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=9)
    for step in (9, 10, 100):
        publish(checkpoints, step)
    (checkpoints.folder / "notes").mkdir()
    assert checkpoints.steps() == [100, 10, 9]


# What a user may name.


def test_a_run_a_checkpoint_and_the_two_pointers_can_be_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = CheckpointStore(run, keep=9)
    publish(checkpoints, 1)
    publish(checkpoints, 2, best_step=1)
    best, last = (checkpoints.folder / f"step-00000000{step}" for step in (1, 2))
    assert find_checkpoint(run) == best
    assert find_checkpoint(run, prefer="last") == last
    assert find_checkpoint(run / "checkpoints") == best
    assert find_checkpoint(run / "checkpoints" / "best") == best
    assert find_checkpoint(run / "checkpoints" / "last") == last
    assert find_checkpoint(last) == last


def test_a_run_without_a_best_checkpoint_gives_its_last(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=9)
    checkpoints.publish(make_checkpoint(3, best=None), is_best=False)
    (checkpoints.folder / "best.json").unlink(missing_ok=True)
    assert find_checkpoint(tmp_path).name == "step-000000003"


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_run_may_itself_be_called_best_or_last(tmp_path: Path, name: str) -> None:
    publish(CheckpointStore(tmp_path / name, keep=9), 1)
    assert find_checkpoint(tmp_path / name).name == "step-000000001"


def test_a_place_without_a_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "best"):
        with pytest.raises(InputError, match="expected a run directory or a checkpoint"):
            find_checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_a_damaged_pointer_is_refused_by_name(tmp_path: Path, text: str) -> None:
    checkpoints = CheckpointStore(tmp_path, keep=9)
    publish(checkpoints, 1)
    (checkpoints.folder / "best.json").write_text(text)
    with pytest.raises(InputError, match=r"best\.json: is damaged"):
        find_checkpoint(tmp_path)


# No pickle.

_PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", sorted(Path(trainer.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    """Published weights come as .pt files: of those tensors alone are read, which torch.load does when told so."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    of_tensors_alone = {
        id(node.func)
        for node in nodes
        if isinstance(node, ast.Call)
        and any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
    }
    for node in nodes:
        if isinstance(node, ast.Import):
            assert not _PICKLERS & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            assert (node.module or "").split(".")[0] not in _PICKLERS or names == {"UnpicklingError"}
            if node.module == "torch":
                assert not {"load", "save"} & names
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = (node.value.id, node.attr)
            assert called not in {("torch", "load"), ("torch", "save"), ("yaml", "load")} or (
                called == ("torch", "load") and id(node) in of_tensors_alone
            )
        elif isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle" or (isinstance(node.value, ast.Constant) and node.value.value is False)
