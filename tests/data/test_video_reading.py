"""Video corpora: every layout is found, frames come out right, and what is wrong is said before training."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from launch.pack import main as pack_command
from tests.conftest import REAL
from tests.videos import CROP, SIZE, annotate, make_frames, open_split, write_frames, write_video
from trainer.data.opening import OpenCorpus
from trainer.data.table import Split
from trainer.data.video.sources import is_video_corpus
from trainer.data.video.table import read_video_split
from trainer.errors import InputError
from trainer.recipe import CorpusRecipe

FRAMES = 12


def read(split: Split, index: int = 0, frames: int = FRAMES) -> np.ndarray:
    size = split.storage.crop_size
    return split.read(index, np.empty((frames, size, size, 3), np.uint8))


def problem_of(split: Split, index: int = 0) -> str:
    found = split.table.scan(index).problem
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("where", "folder"),
    [
        ("features/fullFrame-256x256px/{split}/a/1", "a/1/*.png"),
        ("features/fullFrame-210x260px/{split}/a/1", "a/1/*.png"),
        # PHOENIX-2014T: the file says `a/1/*.png`, the frames lie in `a`.
        ("features/fullFrame-210x260px/{split}/a", "a/1/*.png"),
        ("{split}/a", "a"),
        ("{split}/a/1", ""),
        ("frames/a", ""),
        ("a", "a/*.png"),
    ],
)
def test_frames_are_found_in_every_layout(tmp_path: Path, where: str, folder: str) -> None:
    annotate(tmp_path, [f"a|{folder}|Signer01|X Y"])
    for split in ("train", "dev"):
        write_frames(tmp_path / where.format(split=split), make_frames(FRAMES))
    assert is_video_corpus(tmp_path, str(tmp_path), "train")
    for split in ("train", "dev"):
        opened = open_split(tmp_path, split)
        assert opened.num_frames.tolist() == [FRAMES]
        assert opened.table.scan(0).problem is None
        assert read(opened)[:, 0, 0, 0].tolist() == [8 * number for number in range(FRAMES)]


def test_of_phoenix_sizes_the_one_asked_for_is_read(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a/1/*.png|Signer01|X"])
    for name, count in (("256x256", 5), ("210x260", 6), ("64x64", 7)):
        write_frames(tmp_path / f"features/fullFrame-{name}px/train/a/1", make_frames(count))
    found = [open_split(tmp_path, size=size).num_frames[0] for size in (256, 210, 64, 100)]
    assert found == [5, 6, 7, 5]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx")])
def test_videos_are_counted_and_read(tmp_path: Path, name: str, codec: str) -> None:
    annotate(tmp_path, [f"a|{name}|Signer01|X"])
    frames = make_frames(FRAMES, size=(64, 64))
    write_video(tmp_path / name, frames, codec=codec)
    split = open_split(tmp_path, size=64, crop=64)
    assert split.num_frames.tolist() == [FRAMES]
    assert split.table.scan(0).problem is None
    assert np.abs(read(split).astype(int) - frames).mean() < 6


def test_jpeg_frames_of_another_size_are_brought_to_the_recipe(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X"])
    write_frames(tmp_path / "train" / "a", make_frames(FRAMES, size=(64, 48)), suffix=".jpg")
    seen = read(open_split(tmp_path))
    assert seen.shape == (FRAMES, CROP, CROP, 3)
    # Of 32 pixels the middle 24: an eighth of the ramp from 0 to 255 is cut off at each side.
    assert np.abs(seen[:, :, 0, 1].astype(int) - 255 / 8).max() < 16
    assert np.abs(seen[:, :, -1, 1].astype(int) - 255 * 7 / 8).max() < 16
    stored = Image.open(tmp_path / "train" / "a" / "frame3.jpg")
    whole = np.asarray(stored.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert np.abs(seen[3].astype(int) - whole[4:28, 4:28]).max() <= 2


def test_videos_are_resized_as_frames_are(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X", "b|b.mkv|Signer01|X"])
    frames = make_frames(FRAMES, size=(64, 48))
    write_frames(tmp_path / "train" / "a", frames)
    write_video(tmp_path / "train" / "b.mkv", frames, codec="ffv1", pixels="bgr0")
    split = open_split(tmp_path)
    assert np.abs(read(split, 0).astype(int) - read(split, 1)).max() <= 4


def test_clips_cut_short_are_read_to_there(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X", "b|b.mp4|Signer01|X"])
    write_frames(tmp_path / "train" / "a", make_frames(FRAMES))
    write_video(tmp_path / "train" / "b.mp4", make_frames(FRAMES))
    whole = open_split(tmp_path)
    split = whole.cut(5)
    assert split.num_frames.tolist() == [5, 5]
    assert read(split, 0, 5)[:, 0, 0, 0].tolist() == [0, 8, 16, 24, 32]
    assert np.array_equal(read(split, 1, 5), read(whole, 1)[:5])


def test_features_are_told_from_video(tmp_path: Path, corpus: Path) -> None:
    assert not is_video_corpus(corpus, str(corpus / "annotations"), "train")
    annotate(tmp_path, ["a|a|Signer01|X"])
    assert not is_video_corpus(tmp_path, str(tmp_path), "train")


def test_where_features_lie_beside_their_frames_the_model_chooses(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X"])
    write_frames(tmp_path / "features" / "fullFrame-210x260px" / "train" / "a", make_frames(FRAMES))
    (tmp_path / "train").mkdir()
    np.savez(tmp_path / "train" / "a.npz", features=np.zeros((6, 3), np.float32))
    for video in (True, False):
        split = OpenCorpus(CorpusRecipe(data_dir=str(tmp_path)), print, video=video).split("train")
        assert split.is_video is video


def test_a_model_of_the_other_kind_is_refused(tmp_path: Path, corpus: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X"])
    write_frames(tmp_path / "train" / "a", make_frames(FRAMES))
    with pytest.raises(InputError, match=r"holds video, the model takes features; choose a model of video .*i3d"):
        OpenCorpus(CorpusRecipe(data_dir=str(tmp_path)), print, video=False).split("train")
    with pytest.raises(InputError, match="holds features, the model takes video; choose a model of features"):
        OpenCorpus(CorpusRecipe(data_dir=str(corpus)), print, video=True).split("train")


def test_a_folder_without_annotations_is_not_taken_for_features(tmp_path: Path) -> None:
    write_frames(tmp_path / "frames" / "a", make_frames(FRAMES))
    with pytest.raises(InputError) as refused:
        OpenCorpus(CorpusRecipe(data_dir=str(tmp_path)), print, video=True).split("train")
    assert "holds features" not in str(refused.value)
    assert "train" in str(refused.value)


def test_packing_refuses_video(tmp_path: Path) -> None:
    annotate(tmp_path / "videos", ["a|a|Signer01|X"])
    write_frames(tmp_path / "videos" / "train" / "a", make_frames(FRAMES))
    with pytest.raises(InputError, match="holds video, and only features can be packed"):
        pack_command([str(tmp_path / "videos"), str(tmp_path / "packed")])


def test_clips_without_frames_are_named_or_left_out_aloud(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X", "b|b/1/*.png|Signer01|X"])
    write_frames(tmp_path / "train" / "a", make_frames(FRAMES))
    with pytest.raises(InputError, match=r"1 of 2 annotated clips have no frames: b \(line 3\); .*--allow_missing"):
        open_split(tmp_path)
    said: list[str] = []
    split = read_video_split(
        tmp_path, str(tmp_path), "train", frame_size=SIZE, crop_size=CROP, allow_missing=True, log=said.append
    )
    assert [split.id(index) for index in range(len(split))] == ["a"]
    assert said == [text for text in said if "b (line 3); dropped, as --allow_missing says" in text] != []


def test_a_folder_without_frames_is_named(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X", "b|b|Signer01|X"])
    write_frames(tmp_path / "train" / "a", make_frames(FRAMES))
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b" / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"train/b: expected the frames of a clip \(\*.png or \*.jpg\), found none"):
        open_split(tmp_path)


def test_fewer_frames_than_the_index_says(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X|13"], header="id|folder|signer|annotation|num_frames")
    write_frames(tmp_path / "train" / "a", make_frames(FRAMES))
    with pytest.raises(InputError, match="train/a: holds 12 frames, line 2 of the annotations says 13"):
        open_split(tmp_path)


def test_a_video_of_fewer_frames_than_the_index_says(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a.mp4|Signer01|X|13"], header="id|folder|signer|annotation|num_frames")
    write_video(tmp_path / "train" / "a.mp4", make_frames(FRAMES))
    with pytest.raises(InputError, match=r"train/a\.mp4: holds 12 frames, line 2 of the annotations says 13"):
        open_split(tmp_path)


def test_two_kinds_of_frames_in_a_clip(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a|Signer01|X"])
    write_frames(tmp_path / "train" / "a", make_frames(3))
    write_frames(tmp_path / "train" / "a", make_frames(3), suffix=".jpg")
    with pytest.raises(InputError, match="train/a: expected frames of one kind, found JPEG and PNG files"):
        open_split(tmp_path)


def spoilt(tmp_path: Path, suffix: str = ".png") -> tuple[Split, Path]:
    """A corpus of one clip, opened, and the frame that the test spoils afterwards."""
    annotate(tmp_path, ["a|a|Signer01|X"])
    folder = write_frames(tmp_path / "train" / "a", make_frames(FRAMES), suffix=suffix)
    return open_split(tmp_path), folder / f"frame7{suffix}"


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_a_truncated_frame_is_named_by_checks_and_by_reading(tmp_path: Path, suffix: str, share: float) -> None:
    split, frame = spoilt(tmp_path, suffix)
    content = frame.read_bytes()
    frame.write_bytes(content[: int(share * len(content))])
    assert problem_of(split).startswith(str(frame))
    with pytest.raises(InputError, match=r"frame7.*not a whole PNG or JPEG frame"):
        read(split)


def test_mixed_frame_sizes_are_named(tmp_path: Path) -> None:
    split, frame = spoilt(tmp_path)
    Image.fromarray(make_frames(1, size=(40, 32))[0]).save(frame)
    expected = f"{frame}: expected 32x32 pixels as in the clip's first frame, found 40x32"
    assert expected in problem_of(split)
    with pytest.raises(InputError, match="expected 32x32 pixels"):
        read(split)


@pytest.mark.parametrize(
    ("mode", "suffix", "name"),
    [("L", ".png", "grey-scale"), ("L", ".jpg", "grey-scale"), ("RGBA", ".png", "RGBA"), ("P", ".png", "a palette")],
)
def test_frames_that_are_not_rgb_are_refused(tmp_path: Path, mode: str, suffix: str, name: str) -> None:
    split, frame = spoilt(tmp_path, suffix)
    Image.open(frame).convert(mode).save(frame)
    assert f"{frame}: expected RGB, found {name}" in problem_of(split)
    with pytest.raises(InputError, match="expected RGB, found"):
        read(split)


def test_frames_that_vanish_during_a_run_are_noticed(tmp_path: Path) -> None:
    split, frame = spoilt(tmp_path)
    frame.unlink()
    with pytest.raises(InputError, match="holds 11 frames, 12 when the run began"):
        read(split)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    split, frame = spoilt(tmp_path)
    frame.write_text("<html>404</html>")
    assert f"{frame}: not a whole PNG or JPEG frame" in problem_of(split)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_mp4_is_named(tmp_path: Path, share: float) -> None:
    annotate(tmp_path, ["a|a.mp4|Signer01|X"])
    video = write_video(tmp_path / "train" / "a.mp4", make_frames(60, size=(64, 64)))
    split = open_split(tmp_path)
    content = video.read_bytes()
    video.write_bytes(content[: int(share * len(content))])
    assert str(video) in problem_of(split)
    with pytest.raises(InputError, match=r"a\.mp4: not a whole video"):
        open_split(tmp_path)


def test_an_mp4_cut_behind_its_index_is_named(tmp_path: Path) -> None:
    annotate(tmp_path, ["a|a.mp4|Signer01|X"])
    plain = write_video(tmp_path / "plain.mp4", make_frames(60, size=(64, 64)))
    # With its index in front, a file cut short still opens and says how many frames it had.
    (tmp_path / "train").mkdir()
    video = tmp_path / "train" / "a.mp4"
    with av.open(str(plain)) as source, av.open(str(video), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = video.read_bytes()
    video.write_bytes(content[: int(0.9 * len(content))])
    split = open_split(tmp_path)
    assert split.num_frames.tolist() == [60]
    assert f"{video}: " in problem_of(split)
    with pytest.raises(InputError, match=r"a\.mp4"):
        split.read(0, np.empty((60, CROP, CROP, 3), np.uint8))


@pytest.mark.parametrize("pixels", ["gray", "bgra"])
def test_a_grey_or_transparent_video_is_refused(tmp_path: Path, pixels: str) -> None:
    annotate(tmp_path, ["a|a.mkv|Signer01|X"])
    write_video(tmp_path / "train" / "a.mkv", make_frames(FRAMES), codec="ffv1", pixels=pixels)
    with pytest.raises(InputError, match=rf"a\.mkv: expected colours .*, found pixels of the kind {pixels}"):
        open_split(tmp_path)


def test_files_that_change_change_the_stamp(tmp_path: Path) -> None:
    split, frame = spoilt(tmp_path)
    before = split.stamp()
    assert open_split(tmp_path).stamp() == before
    frame.unlink()
    assert open_split(tmp_path).stamp() != before


@pytest.fixture(scope="module")
def recorded() -> Path:
    folder = REAL / "video_msl"
    if not folder.is_dir():
        pytest.skip("the video_msl recordings are not beside this checkout")
    return folder


def test_real_frames_and_their_videos_agree(tmp_path: Path, recorded: Path) -> None:
    splits = []
    for name, file in (("frames", "video.corpus.csv"), ("mp4", "video.csv")):
        (tmp_path / name).mkdir()
        shutil.copy(recorded / file, tmp_path / name / f"train{file.removeprefix('video')}")
        splits.append(
            read_video_split(
                recorded,
                str(tmp_path / name),
                "train",
                frame_size=64,
                crop_size=56,
                allow_missing=False,
                log=lambda text: None,
            )
        )
    frames, videos = splits
    assert frames.num_frames.tolist() == videos.num_frames.tolist()
    assert frames.num_frames.sum() == 308
    assert [split.table.scan(index).problem for split in splits for index in range(5)] == [None] * 10
    for split in splits:
        assert 20 < read(split, 0, int(split.num_frames[0])).mean() < 235
