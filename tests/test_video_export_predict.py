"""Models of video are exported in every format, and recognise what a user hands them: videos and folders of frames."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.export import main as export
from launch.predict import main as predict
from tests.conftest import REAL
from tests.publishing import publish
from tests.videos import annotate, make_frames, write_frames, write_video
from trainer.checkpoint.content import read_checkpoint
from trainer.checkpoint.store import find_checkpoint
from trainer.data.normalization import of_frames
from trainer.errors import InputError
from trainer.evaluate import main as evaluate
from trainer.export.clip_model import ClipModel
from trainer.export.formats import open_recognition
from trainer.export.recognition import Card, recognition_of, restore_model
from trainer.models.build import build_model
from trainer.recipe import ModelRecipe

SIZE, CROP = 40, 35
LENGTHS = (21, 13, 30)
SMALL = ["--width", "0.05", "--rnn_size", "8", "--frame_size", str(SIZE)]


def draw(length: int, seed: int) -> np.ndarray:
    """Frames that change over time, so that a clip has more than one thing to say."""
    frames = make_frames(length, size=(SIZE, SIZE), seed=seed)
    frames[length // 2 :] = 255 - frames[length // 2 :]
    return frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of frames and a video, the same clips in train and dev."""
    folder = annotate(tmp_path_factory.mktemp("videos"), ["a|a|S1|P Q R", "b|b|S1|Q T", "c|c.mp4|S1|U P"])
    for name, length in zip("ab", LENGTHS, strict=False):
        write_frames(folder / name, draw(length, length))
    write_video(folder / "c.mp4", draw(LENGTHS[2], 5))
    return folder


def untrained(run: Path, videos: Path, model: str) -> Path:
    """A model of fresh weights whose scores differ from frame to frame."""

    def sharpen(weights: dict[str, torch.Tensor]) -> None:
        weights["head.classifier.weight"] *= 40.0
        weights["head.classifier.bias"][0] = -2.0

    return publish(run, videos, "--model", model, *SMALL, change=sharpen)


@pytest.fixture(scope="module")
def run(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("student") / "run", videos, "mobilenet_v3_small")


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert predict([*map(str, arguments), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["clips"]
    return found


def inputs(videos: Path) -> list[Path]:
    return [videos / "a", videos / "b", videos / "c.mp4"]


def without_confidence(clips: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[{k: v for k, v in gloss.items() if k != "confidence"} for gloss in clip["glosses"]] for clip in clips]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("mobilenet_v3_small", "safetensors"),
        pytest.param("mobilenet_v3_small", "torch_export", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", "onnx", marks=pytest.mark.slow),
        pytest.param("i3d", "safetensors", marks=pytest.mark.slow),
        pytest.param("i3d", "torch_export", marks=pytest.mark.slow),
        pytest.param("i3d", "onnx", marks=pytest.mark.slow),
    ],
)
def test_an_export_gives_the_hypotheses_of_the_run_and_needs_nothing_of_it(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, kind: str
) -> None:
    trained = run if model == "mobilenet_v3_small" else untrained(tmp_path / "run", videos, model)
    out = tmp_path / "exports" / kind
    assert export(["--checkpoint", str(trained), "--format", kind, "--output", str(out)]) == 0
    report = json.loads((out / "export.json").read_text())
    assert (report["frame_size"], report["crop_size"]) == (SIZE, CROP)
    assert report["verification"]["clips"] == report["verification"]["same_hypotheses"] == 3
    assert report["verification"]["largest_difference"] < 1e-3

    # The model file alone, elsewhere.
    lonely = tmp_path / report["file"]
    lonely.write_bytes((out / report["file"]).read_bytes())
    expected = predicted(capsys, *inputs(videos), "--checkpoint", trained)
    assert all(clip["glosses"] for clip in expected), "the model should say something"
    found = predicted(capsys, *inputs(videos), "--checkpoint", lonely)
    assert without_confidence(found) == without_confidence(expected)
    exported, own = open_recognition(lonely), open_recognition(trained)
    for num_frames in (1, 3, 4, 5, 8, 40):
        frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, CROP, CROP, 3), dtype=np.uint8)
        if num_frames < exported.min_frames:
            short = write_frames(tmp_path / str(num_frames), frames)
            with pytest.raises(InputError, match=f"has {num_frames} frames, this export takes 5 or more"):
                predict([str(short), "--checkpoint", str(lonely)])
            continue
        assert exported.scores(frames) == pytest.approx(own.scores(frames), abs=1e-3)


@pytest.mark.parametrize("total_stride", [1, 2, 4])
@pytest.mark.parametrize("model", ["mobilenet_v3_small", "i3d"])
def test_the_model_of_one_clip_computes_what_the_trainer_computes(model: str, total_stride: Any) -> None:
    recipe = ModelRecipe(model=model, width=0.02, rnn_size=4, total_stride=total_stride)  # type: ignore[arg-type]
    trained = build_model(recipe, feature_dim=0, num_classes=5).eval()
    card = Card(
        glosses=tuple("ABCD"),
        feature_dim=3,
        total_stride=total_stride,
        normalization="frames",
        model=dataclasses.asdict(recipe),
        step=0,
        frame_size=36,
        crop_size=33,
    )
    own, alone = recognition_of(trained, of_frames(), card), ClipModel(trained, of_frames())
    for num_frames in (1, 2, 7, 16):
        frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 33, 33, 3), dtype=np.uint8)
        with torch.no_grad():
            assert alone(torch.from_numpy(frames)).numpy() == pytest.approx(own.scores(frames), abs=1e-5)


def test_an_evaluation_times_each_clip_as_its_file_says_unless_it_is_told(
    run: Path, videos: Path, tmp_path: Path
) -> None:
    """The same frames in a file of twice the rate pass in half the time; folders of frames have no clock of theirs."""
    corpora = {rate: annotate(tmp_path / str(rate), ["a|a|S1|P Q R", "c|c.mkv|S1|U P"]) for rate in (25, 50)}
    for rate, folder in corpora.items():
        (folder / "a").symlink_to(videos / "a")
        # Without loss, so that the frames are the same to the bit.
        write_video(folder / "c.mkv", draw(LENGTHS[2], 5), rate=rate, codec="ffv1")

    def times(data_dir: Path, *flags: str) -> dict[str, list[tuple[float, float]]]:
        out = ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "out")]
        evaluate(["--checkpoint", str(run), "--split", "dev", *out, *flags])
        found: dict[str, list[tuple[float, float]]] = {}
        for line in (tmp_path / "out" / "dev.ctm").read_text().splitlines():
            if not line.startswith(";;"):
                clip, _, start, duration, _ = line.split()
                found.setdefault(clip, []).append((float(start), float(duration)))
        return found

    def halved(clip: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(start / 2, duration / 2) for start, duration in clip]

    slow = times(corpora[25])
    assert slow.keys() == {"a", "c"}
    assert times(corpora[50]) == {"a": slow["a"], "c": halved(slow["c"])}
    assert times(corpora[50], "--fps", "25") == slow
    assert times(corpora[25], "--fps", "50") == {name: halved(clip) for name, clip in slow.items()}


def test_predictions_are_those_of_the_evaluation_with_times_as_the_video_says(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(["--checkpoint", str(run), "--split", "dev", "--output_dir", str(tmp_path / "out")])
    rows = [line.split() for line in (tmp_path / "out" / "dev.ctm").read_text().splitlines() if line[:2] != ";;"]
    found = predicted(capsys, *inputs(videos), "--checkpoint", run)
    for clip in found:
        expected = [(row[4], float(row[2])) for row in rows if row[0] == Path(clip["file"]).stem]
        assert [(gloss["gloss"], gloss["start"]) for gloss in clip["glosses"]] == expected
        assert clip["fps"] == 25
        for gloss in clip["glosses"]:
            assert 0 <= gloss["start"] < gloss["end"] <= clip["seconds"]
            assert 0 < gloss["confidence"] <= 1
    assert [clip["frames"] for clip in found] == list(LENGTHS)
    # The same frames at twice the speed: the file says so, and --fps says otherwise.
    fast = write_video(tmp_path / "fast.mp4", draw(LENGTHS[2], 5), rate=50)
    [[said], [told]] = (predicted(capsys, fast, "--checkpoint", run, *flags) for flags in ([], ["--fps", "25"]))
    assert (said["fps"], said["seconds"]) == (50, found[2]["seconds"] / 2)
    assert (told["fps"], told["seconds"]) == (25, found[2]["seconds"])
    assert [(gloss["gloss"], gloss["start"] / 2) for gloss in told["glosses"]] == [
        (gloss["gloss"], gloss["start"]) for gloss in said["glosses"]
    ]


def test_frames_of_another_size_are_brought_to_that_of_the_training(run: Path, tmp_path: Path) -> None:
    from trainer.export.inputs import read_clip

    card = Card.of(read_checkpoint(find_checkpoint(run), with_optimizer=False))
    wide = write_frames(tmp_path / "wide", make_frames(6, size=(120, 80)), suffix=".jpg")
    video = write_video(tmp_path / "wide.mp4", make_frames(6, size=(120, 80)))
    seen = [read_clip(path, card).values for path in (wide, video)]
    assert [one.shape for one in seen] == [(6, CROP, CROP, 3)] * 2
    assert np.abs(seen[0].astype(int) - seen[1]).mean() < 4
    # Of the ramp from left to right a sixteenth is cut off at each side.
    assert np.abs(seen[0][:, :, 0, 1].astype(int) - 255 / 16).max() < 12


def test_bad_inputs_are_named_all_at_once_before_anything_is_recognised(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, mixed, grey, cut, hollow = (tmp_path / name for name in ("empty", "mixed", "grey", "cut", "hollow"))
    empty.mkdir()
    for folder in (mixed, grey, cut, hollow):
        write_frames(folder, draw(9, 1))
    Image.fromarray(make_frames(1, size=(50, 40))[0]).save(mixed / "frame3.png")
    Image.open(grey / "frame4.png").convert("L").save(grey / "frame4.png")
    (cut / "frame5.png").write_bytes((cut / "frame5.png").read_bytes()[:-40])
    # Whole at both ends, damaged in between: only decoding tells.
    content = bytearray((hollow / "frame6.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (hollow / "frame6.png").write_bytes(content)
    short = tmp_path / "short.mp4"
    short.write_bytes((videos / "c.mp4").read_bytes()[:600])
    features, text, gone = tmp_path / "clip.npz", tmp_path / "clip.txt", tmp_path / "gone.mp4"
    np.savez(features, features=np.zeros((9, 33), np.float32))
    text.write_text("no clip")
    expected = {
        empty: "expected the frames of a clip",
        mixed / "frame3.png": "expected 40x40 pixels as in the clip's first frame, found 50x40",
        grey / "frame4.png": "expected RGB, found grey-scale",
        cut / "frame5.png": "cut short",
        hollow / "frame6.png": "not a whole PNG or JPEG frame",
        short: "not a whole video",
        features: "holds features, mobilenet_v3_small takes video",
        text: "expected features (.npz), a video (.mp4",
        gone: "no such file",
    }
    named = [empty, mixed, grey, cut, hollow, short, features, text, gone]
    with pytest.raises(InputError) as caught:
        predict([str(videos / "a"), *map(str, named), "--checkpoint", str(run)])
    assert len(caught.value.problems) == len(expected)
    for problem, (path, said) in zip(caught.value.problems, expected.items(), strict=True):
        assert problem.startswith(f"{path}: ")
        assert said in problem
    assert not capsys.readouterr().out


def test_weights_of_another_architecture_are_refused(run: Path) -> None:
    checkpoint = read_checkpoint(find_checkpoint(run), with_optimizer=False)
    card = Card.of(checkpoint)
    other = dataclasses.replace(card, model={**card.model, "model": "i3d"})
    with pytest.raises(InputError, match=r"runs/x: lacks backbone\.Conv3d_1a_7x7"):
        restore_model(other, checkpoint.model, "runs/x")


def test_real_videos_and_their_frames_are_recognised(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = REAL / "video_msl"
    if not folder.is_dir():
        pytest.skip("the video_msl recordings are not beside this checkout")
    clips = [folder / "mp4" / "yo_001.mp4", folder / "frames" / "yo_001" / "1"]
    video, frames = predicted(capsys, *clips, "--checkpoint", run)
    assert video["frames"] == frames["frames"] > 20
    assert (video["fps"], frames["fps"]) == (30, 25)
