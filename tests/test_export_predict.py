"""An exported model is the trained one, whatever its format, and says so; predictions carry times and confidences."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.export import main as export
from launch.predict import main as predict
from tests.conftest import train
from trainer.checkpoint.content import read_checkpoint
from trainer.checkpoint.store import find_checkpoint
from trainer.data.normalization import Normalization, clip_statistics
from trainer.errors import InputError, TrainingFailedError
from trainer.evaluate import main as evaluate
from trainer.export.clip_model import ClipModel, Normalize
from trainer.export.formats import open_recognition
from trainer.export.recognition import Card, recognition_of, restore_model
from trainer.export.verify import Verification
from trainer.models.student import FeatureStudent
from trainer.models.teacher import FeatureTeacher


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student over features that has learnt something, with a normalisation of each clip by itself."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    flags = ["--model", "student", "--max_steps", "60", "--learning_rate", "1e-2", "--warmup_epochs", "0"]
    flags += ["--batch_size", "8", "--normalization", "clip", "--width", "0.1", "--rnn_size", "24"]
    train(1, corpus, folder, *flags)
    return folder


@pytest.fixture(scope="module")
def clip(corpus: Path) -> Path:
    return sorted((corpus / "dev").glob("*.npz"))[0]


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert predict([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "kind",
    [
        "safetensors",
        pytest.param("torch_export", marks=pytest.mark.slow),
        pytest.param("onnx", marks=pytest.mark.slow),
    ],
)
def test_an_export_gives_the_hypotheses_of_the_run_and_needs_nothing_of_it(
    run: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "exports" / kind
    assert export(["--checkpoint", str(run), "--format", kind, "--output", str(out)]) == 0
    report = json.loads((out / "export.json").read_text())
    assert report["verification"]["clips"] == report["verification"]["same_hypotheses"] == 5
    assert report["verification"]["largest_difference"] < 1e-4
    assert sorted(path.name for path in out.parent.iterdir()) == [kind]

    # The model file alone, elsewhere.
    lonely = tmp_path / report["file"]
    lonely.write_bytes((out / report["file"]).read_bytes())
    expected = predicted(capsys, clip, "--checkpoint", run)["clips"]
    assert expected[0]["glosses"], "the run should have learnt to say something"
    for where in (out, lonely):
        found = predicted(capsys, clip, "--checkpoint", where)["clips"]
        assert [g.pop("confidence") for g in found[0]["glosses"]] == pytest.approx(
            [g["confidence"] for g in expected[0]["glosses"]], abs=1e-3
        )
        assert found[0]["glosses"] == [
            {k: v for k, v in g.items() if k != "confidence"} for g in expected[0]["glosses"]
        ]

    # Lengths other than the one the graph was drawn with, down to a single frame.
    checkpoint = read_checkpoint(find_checkpoint(run), with_optimizer=False)
    card = Card.of(checkpoint)
    trained = recognition_of(restore_model(card, checkpoint.model, "run"), checkpoint.normalization, card)
    exported = open_recognition(lonely)
    for num_frames in (1, 3, 4, 5, 8, 57, 130):
        if num_frames < exported.min_frames:
            short = tmp_path / f"{num_frames}.npz"
            np.savez(short, features=np.zeros((num_frames, card.feature_dim), np.float32))
            with pytest.raises(InputError, match=f"has {num_frames} frames, this export takes 5 or more"):
                predict([str(short), "--checkpoint", str(lonely)])
            continue
        features = np.random.default_rng(num_frames).normal(size=(num_frames, card.feature_dim)).astype(np.float32)
        assert exported.scores(features) == pytest.approx(trained.scores(features), abs=1e-4)


@pytest.mark.parametrize("kind", [FeatureTeacher, FeatureStudent])
@pytest.mark.parametrize("total_stride", [1, 2, 4])
def test_the_model_of_one_clip_computes_what_the_trainer_computes(kind: Any, total_stride: int) -> None:
    model = kind(feature_dim=6, num_classes=5, total_stride=total_stride, width=0.05, rnn_size=8, rnn_layers=2).eval()
    identity = Normalization(kind="none", mean=np.zeros(6, np.float32), scale=np.ones(6, np.float32))
    card = Card(glosses=tuple("ABCD"), feature_dim=6, total_stride=total_stride, normalization="none", model={}, step=0)
    trained, alone = recognition_of(model, identity, card), ClipModel(model, identity)
    for num_frames in (1, 2, 7, 16):
        features = torch.randn(num_frames, 6)
        with torch.no_grad():
            assert alone(features).numpy() == pytest.approx(trained.scores(features.numpy()), abs=1e-5)


def test_normalisation_in_a_graph_is_that_of_the_loader() -> None:
    features = np.random.default_rng(0).normal(5.0, 3.0, size=(20, 4)).astype(np.float32)
    features[:, 2] = 7.0
    mean, scale = clip_statistics(features)
    stored = Normalization(kind="clip", mean=mean + 1, scale=scale)
    by_clip = Normalize(stored)(torch.from_numpy(features)).numpy()
    assert by_clip == pytest.approx((features - mean) * scale, abs=1e-6)
    assert not by_clip[:, 2].any()
    by_corpus = Normalize(dataclasses.replace(stored, kind="corpus"))(torch.from_numpy(features)).numpy()
    assert by_corpus == pytest.approx((features - mean - 1) * scale, abs=1e-5)
    unchanged = Normalize(dataclasses.replace(stored, kind="none"))(torch.from_numpy(features)).numpy()
    assert (unchanged == features).all()


def test_predictions_are_those_of_the_evaluation_with_times_within_the_clip(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = sorted((corpus / "dev").glob("*.npz"))
    for width in ("1", "10"):
        out = tmp_path / width
        evaluate(["--checkpoint", str(run), "--split", "dev", "--beam_width", width, "--output_dir", str(out)])
        assert json.loads((out / "dev.json").read_text())["beam_width"] == int(width)
        rows = [line.split() for line in (out / "dev.ctm").read_text().splitlines() if not line.startswith(";;")]
        found = predicted(capsys, *clips, "--checkpoint", run, "--beam_width", width)
        assert found["beam_width"] == int(width)
        for clip in found["clips"]:
            expected = [(row[4], float(row[2])) for row in rows if row[0] == Path(clip["file"]).stem]
            assert [(gloss["gloss"], gloss["start"]) for gloss in clip["glosses"]] == expected
            ends = [0.0, *(gloss["end"] for gloss in clip["glosses"])]
            for end, gloss in zip(ends, clip["glosses"], strict=False):
                assert end <= gloss["start"] < gloss["end"] <= clip["seconds"]
                assert 0.0 < gloss["confidence"] <= 1.0
    halved = predicted(capsys, *clips, "--checkpoint", run, "--fps", "50")
    for slow, fast in zip(found["clips"], halved["clips"], strict=True):
        assert fast["seconds"] == pytest.approx(slow["seconds"] / 2, abs=1e-3)
    assert predict([str(clips[0]), "--checkpoint", str(run)]) == 0
    assert str(clips[0]) in capsys.readouterr().out


def test_greedy_evaluation_is_the_validation_of_the_training(run: Path, tmp_path: Path) -> None:
    state = read_checkpoint(find_checkpoint(run), with_optimizer=False).state
    evaluate(["--checkpoint", str(run), "--split", "dev", "--beam_width", "1", "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "dev.json").read_text())
    assert report["wer"] == pytest.approx(state.best_wer)
    assert report["decoder"] == "best path"


def test_a_language_model_can_overrule_the_scores(
    run: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    glosses = read_checkpoint(find_checkpoint(run), with_optimizer=False).vocabulary.glosses
    favourite = glosses[0]
    others = "".join(f"-9\t{gloss}\n" for gloss in glosses[1:])
    lm = tmp_path / "favourite.arpa"
    lm.write_text(f"\\data\\\nngram 1={len(glosses) + 1}\n\\1-grams:\n-0.1\t{favourite}\n{others}-1\t</s>\n\\end\\\n")
    found = predicted(capsys, clip, "--checkpoint", run, "--lm", lm, "--lm_weight", "5", "--lm_insertion", "3")
    assert found["lm"] == str(lm)
    assert {gloss["gloss"] for gloss in found["clips"][0]["glosses"]} <= {favourite}
    lm.write_text(lm.read_text().replace("-9\t", "-9 x\t", 1))
    with pytest.raises(InputError, match=r"favourite.arpa:5: expected 'log10\(p\) word"):
        predict([str(clip), "--checkpoint", str(run), "--lm", str(lm)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beam_width", "0"], "--beam_width 0: expected 1"),
        (["--beam_width", "1", "--lm", "x.arpa"], "cannot use a language model"),
        (["--lm_weight", "1"], "--lm_weight belongs to a language model"),
        (["--lm_insertion", "1"], "--lm_insertion belongs to a language model"),
        (["--lm", "x.arpa", "--lm_weight", "-1"], "--lm_weight -1.0: expected a number above 0"),
        (["--lm", "x.arpa", "--lm_insertion", "nan"], "--lm_insertion nan: expected a finite number"),
        (["--lm", "none.arpa"], "none.arpa: no such file"),
    ],
)
def test_decoder_options_that_cannot_be_are_refused_by_every_command(
    run: Path, clip: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    for command in (
        lambda: predict([str(clip), "--checkpoint", str(run), *flags]),
        lambda: evaluate(["--checkpoint", str(run), "--split", "dev", "--output_dir", str(tmp_path / "out"), *flags]),
    ):
        with pytest.raises(InputError, match=message):
            command()
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named_all_at_once_before_anything_is_computed(run: Path, clip: Path, tmp_path: Path) -> None:
    wide, cut = tmp_path / "wide.npz", tmp_path / "cut.npz"
    np.savez(wide, features=np.zeros((9, 33), np.float32))
    cut.write_bytes(clip.read_bytes()[:200])
    (tmp_path / "frames").mkdir()
    names = [tmp_path / "none.npz", wide, cut, tmp_path / "clip.mp4", tmp_path / "frames"]
    with pytest.raises(InputError) as caught:
        predict([*map(str, names), str(clip), "--checkpoint", str(run)])
    assert len(caught.value.problems) == 5
    for name, problem in zip(names, caught.value.problems, strict=True):
        assert str(name) in problem
    assert "expected D = 32 as in training, found 33" in caught.value.problems[1]


def test_damaged_exports_are_refused_by_name(run: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(["--checkpoint", str(run), "--format", "safetensors", "--output", str(out), "--no_verify"])
    assert json.loads((out / "export.json").read_text())["verification"] is None
    model = out / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    for name in ("model.pt2", "model.onnx"):
        (out / name).write_bytes(b"PK\x03\x04 nothing")
    for where in (out, *out.glob("model.*")):
        with pytest.raises(InputError, match="damaged"):
            predict([str(clip), "--checkpoint", str(where)])
    with pytest.raises(InputError, match="no such file"):
        predict([str(clip), "--checkpoint", str(tmp_path / "model.onnx")])
    with pytest.raises(InputError, match="expected a run directory or a checkpoint"):
        predict([str(clip), "--checkpoint", str(tmp_path)])


def test_what_is_there_is_not_written_over_and_a_failed_export_leaves_nothing(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    flags = ["--checkpoint", str(run), "--format", "safetensors", "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(InputError, match="exists already"):
        export(flags)
    (tmp_path / "out" / "notes.txt").unlink()
    with pytest.raises(InputError, match="--no_verify"):
        export([*flags, "--data_dir", str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="holiday"):
        export([*flags, "--split", "holiday"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another --output"):
        export([*flags[:-1], str(tmp_path / "file" / "out")])
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    assert export(flags) == 0


def test_a_model_that_is_not_the_trained_one_is_not_published() -> None:
    right = Verification(split="dev", clips=5, same_hypotheses=5, largest_difference=1e-5)
    right.check()
    for wrong in ({"same_hypotheses": 4}, {"largest_difference": 0.1}, {"largest_difference": float("nan")}):
        with pytest.raises(TrainingFailedError, match="not the trained one"):
            dataclasses.replace(right, **wrong).check()
