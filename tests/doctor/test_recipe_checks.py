"""What training would refuse or regret is found before it: corpus, CTC, checkpoints, memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import run as command
from tests.conftest import TINY, launch
from trainer.assembly import with_absolute_paths
from trainer.checkpoint.content import Checkpoint, RunState
from trainer.checkpoint.store import CheckpointStore
from trainer.data.normalization import Normalization
from trainer.data.synthetic import SyntheticSpec, write_corpus
from trainer.data.vocabulary import Vocabulary
from trainer.doctor.corpus import check_corpus, check_feasibility, check_ranks
from trainer.doctor.finding import Finding, guarded
from trainer.doctor.resume import Start, check_resume
from trainer.errors import InputError
from trainer.files import write_text
from trainer.job.directory import AttemptRecord, JobDirectory
from trainer.parsing import dump_recipe, parse_recipe
from trainer.recipe import Recipe


class Alone:
    """A rank alone."""

    rank, world_size = 0, 1

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]

    def together(self, act: Callable[[], Any]) -> Any:
        return act()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A corpus of 12 training clips that a test may damage."""
    out = tmp_path / "corpus"
    write_corpus(SyntheticSpec(clips=12, seed=5, vocabulary_size=6, feature_dim=32), out, lambda text: None)
    return out


def recipe_of(corpus: Path, *flags: str) -> Recipe:
    return parse_recipe(["--data_dir", str(corpus), "--output_dir", str(corpus.parent / "run"), *TINY, *flags])


def shorten_clips(corpus: Path, count: int) -> list[str]:
    """Cut the first training clips to two frames, and return their ids."""
    paths = sorted((corpus / "train").rglob("*.npz"))[:count]
    for path in paths:
        np.savez(path, features=np.load(path)["features"][:2])
    return [path.stem for path in paths]


def test_every_bad_file_is_named_and_feasibility_is_still_counted(small: Path) -> None:
    first, second, *_ = sorted((small / "train").rglob("*.npz"))
    first.write_bytes(first.read_bytes()[:200])
    features = np.load(second)["features"]
    features[3, 2] = np.nan
    np.savez(second, features=features)
    recipe = recipe_of(small)
    found = guarded("corpus", lambda: check_corpus(recipe, Alone(), Start(), []))
    assert [one.verdict for one in found] == ["FAIL"]
    assert first.name in found[0].value
    np.savez(first, features=np.zeros_like(features))
    found = guarded("corpus", lambda: check_corpus(recipe, Alone(), Start(), []))
    assert [one.verdict for one in found] == ["FAIL"]
    assert second.name in found[0].value
    assert found[0].mend


def test_a_sound_corpus_is_left_for_the_checks_after_it(small: Path) -> None:
    kept: list[Any] = []
    found = list(check_corpus(recipe_of(small), Alone(), Start(), kept))
    assert {one.verdict for one in found} == {"ok"}
    assert len(kept[0].train) == 12
    # Another corpus than the run's.
    start = Start(state=RunState(clips_hash="of other clips", num_clips=7))
    [*_, refused] = guarded("corpus", lambda: check_corpus(recipe_of(small), Alone(), start, []))
    assert refused.verdict == "FAIL"
    assert "7 clips then" in refused.value


@pytest.mark.parametrize(("count", "verdict"), [(0, "ok"), (1, "warn"), (8, "FAIL")])
def test_infeasible_clips_are_counted_at_each_stride(small: Path, count: int, verdict: str) -> None:
    names = shorten_clips(small, count)
    [found] = check_feasibility(recipe_of(small, "--total_stride", "4"))
    assert (found.check, found.verdict) == ("CTC feasibility", verdict)
    if count:
        assert f"{count} of 12" in found.value
        assert names[0] in found.value
        assert f"{count} at 2" in found.value
        assert "total_stride" in found.mend


def test_more_ranks_than_clips_or_than_a_step_has() -> None:
    recipe = parse_recipe(["--data_dir", "x"], check=False)
    assert [one.verdict for one in check_ranks(recipe, 100, 8)] == ["ok"]
    [idle] = check_ranks(recipe, 100, 20)
    assert (idle.verdict, "4 rank(s) idle" in idle.value) == ("warn", True)
    with pytest.raises(InputError, match="12 training clips for 20 ranks"):
        list(check_ranks(recipe, 12, 20))


class Run:
    """A run with two checkpoints, as training leaves it."""

    def __init__(self, corpus: Path) -> None:
        self.recipe = recipe_of(corpus)
        self.folder = Path(self.recipe.run.output_dir)
        stored = with_absolute_paths(self.recipe)
        self.folder.mkdir()
        write_text(self.folder / "recipe.yaml", dump_recipe(stored))
        self.store = CheckpointStore(self.folder, keep=2)
        for step in (10, 20):
            checkpoint = Checkpoint(
                recipe=stored,
                vocabulary=Vocabulary(["REGEN", "WIND"]),
                normalization=Normalization(kind="corpus", mean=np.zeros(8, np.float32), scale=np.ones(8, np.float32)),
                state=RunState(step=step, epoch=step // 10),
                model={"weight": torch.full((64,), float(step))},
                optimizer={},
            )
            self.store.publish(checkpoint, is_best=False)

    def check(self, **changes: Any) -> tuple[list[Finding], Start]:
        start = Start()
        run = dataclasses.replace(self.recipe.run, **changes)
        return guarded("resume state", lambda: check_resume(dataclasses.replace(self.recipe, run=run), start)), start

    def damage(self, step: int) -> None:
        path = self.folder / "checkpoints" / f"step-{step:09d}" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def test_resume_goes_on_from_the_newest_sound_checkpoint(small: Path) -> None:
    run = Run(small)
    for resume in ("auto", ""):
        [found], start = run.check(resume=resume)
        assert (found.verdict, "step 20 (epoch 2)" in found.value) == ("ok", True)
        assert start.state is not None
        assert start.state.step == 20
    run.damage(20)
    [damaged, found], start = run.check()
    assert (damaged.verdict, "step-000000020" in damaged.value) == ("warn", True)
    assert (found.verdict, "step 10 (epoch 1)" in found.value) == ("ok", True)
    run.damage(10)
    [*_, found], start = run.check()
    assert (found.verdict, "none of 2" in found.value) == ("FAIL", True)
    assert start.state is None


def test_resume_refuses_what_training_would(small: Path) -> None:
    run = Run(small)
    [found], _ = run.check(seed=7)
    assert (found.verdict, "seed is 42 there and 7 now" in found.value) == ("FAIL", True)
    [found], _ = run.check(resume=str(run.folder / "nothing"))
    assert found.verdict == "FAIL"
    [found], _ = run.check(output_dir=str(small.parent / "new"))
    assert (found.verdict, "new" in found.value) == ("ok", True)
    # Another attempt is at it.
    JobDirectory.of(run.folder).begin(AttemptRecord(attempt="4711.0", began=1.0, nodes="node[1-2]"))
    [busy, found], _ = run.check()
    assert (busy.verdict, "4711.0" in busy.value, found.verdict) == ("FAIL", True, "ok")


def test_two_real_ranks_find_everything_right(corpus: Path, tmp_path: Path) -> None:
    flags = ["--data_dir", corpus, "--output_dir", tmp_path / "run", *TINY]
    done = launch(1, "launch.cli", ["doctor", "--json", "--cpu", "--processes", "2", *map(str, flags)])
    found = json.loads(done.stdout)
    verdicts = {one["check"]: one["verdict"] for one in found["findings"]}
    assert found["ok"]
    assert set(verdicts.values()) <= {"ok", "warn"}
    values = {one["check"]: one["value"] for one in found["findings"]}
    assert values["ranks"] == "2 on 1 node(s)"
    assert values["all-reduce"].startswith("gloo, 2 ranks, right at every size")
    assert "40 training" in values["corpus"]
    assert "a rank at" in values["worst batch"]
    assert {"CTC feasibility", "resume state", "checkpoint space", "backend"} <= set(verdicts)
    assert not (tmp_path / "run").exists()


def test_a_bad_corpus_fails_and_hides_nothing(small: Path) -> None:
    [path, *_] = sorted((small / "dev").rglob("*.npz"))
    path.write_bytes(b"no archive")
    report = small.parent / "report"
    flags = ["--data_dir", small, "--output_dir", small.parent / "run", *TINY]
    done = launch(1, "launch.cli", ["doctor", "--cpu", "--report", str(report), *map(str, flags)], check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads((report / "findings.json").read_text())
    [corpus] = [one for one in found["findings"] if one["check"] == "corpus"]
    assert (corpus["verdict"], path.name in corpus["value"]) == ("FAIL", True)
    verdicts = {one["check"]: one["verdict"] for one in found["findings"]}
    assert verdicts["worst batch"] == "skipped"
    assert verdicts["CTC feasibility"] == "ok"
    assert "1 FAIL" in done.stdout
    # A report folder is never written over.
    with pytest.raises(InputError, match="is there already"):
        command(["doctor", "--report", str(report)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "gpu"], "--partition: is for a batch job"),
        (["--gpus-per-node", "4"], "--gpus_per_node: is for a batch job"),
        (["--on", "slurm", "--processes", "2"], "--processes: is for --on local"),
        (["--accelerate_config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--proceses", "2"], "did you mean --processes"),
        (["--on", "slurm", "--array", "0-3"], "unknown option --array"),
        (["--on", "slurm", "--no_requeue"], "unknown option --no_requeue"),
        (["--width", "0.5"], "data_dir: not given"),
        (["--processes", "0"], "at least 1"),
    ],
)
def test_mistakes_in_the_command_are_the_users(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        command(["doctor", *words])
