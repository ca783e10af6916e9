"""The synthetic corpus keeps what it promises: determinism, layout, splits that test generalisation."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.synth import main
from trainer.data.synthetic import (
    MIN_OCCURRENCES,
    SPLITS,
    SyntheticSpec,
    invent_clip,
    write_corpus,
)
from trainer.errors import InputError

DEMO = SyntheticSpec(clips=60, seed=3)


def quiet(message: str) -> None:
    """Log nothing."""


def digests(corpus: Path) -> dict[str, str]:
    """Map each file of a corpus to the hash of its bytes."""
    files = (path for path in sorted(corpus.rglob("*")) if path.is_file())
    return {str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_annotations(corpus: Path, split: str) -> list[dict[str, str]]:
    """Read one split's annotations."""
    with (corpus / "annotations" / f"{split}.corpus.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="|", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "demo"
    write_corpus(DEMO, out, quiet)
    return out


def test_same_spec_same_bytes(corpus: Path, tmp_path: Path) -> None:
    write_corpus(DEMO, tmp_path / "again", quiet)
    assert digests(tmp_path / "again") == digests(corpus)


def test_another_seed_gives_other_clips(corpus: Path, tmp_path: Path) -> None:
    write_corpus(SyntheticSpec(clips=60, seed=4), tmp_path / "other", quiet)
    mine, other = digests(corpus), digests(tmp_path / "other")
    assert mine.keys() == other.keys()
    assert not set(mine.values()) & set(other.values())


def test_a_larger_corpus_begins_with_the_smaller_one(corpus: Path, tmp_path: Path) -> None:
    write_corpus(SyntheticSpec(clips=90, seed=3), tmp_path / "larger", quiet)
    mine, larger = digests(corpus), digests(tmp_path / "larger")
    clips = {name for name in mine if name.endswith(".npz")}
    assert len(clips) == 60 + 8 + 8
    assert all(larger[name] == mine[name] for name in clips)
    for split in SPLITS:
        assert read_annotations(tmp_path / "larger", split)[: len(read_annotations(corpus, split))] == read_annotations(
            corpus, split
        )


def test_a_clip_depends_on_nothing_but_its_index(corpus: Path) -> None:
    clip = invent_clip(DEMO, "dev", 5)
    with np.load(corpus / "dev" / f"{clip.id}.npz") as stored:
        assert stored.files == ["features"]
        assert np.array_equal(stored["features"], clip.features)


def test_layout_is_that_of_a_feature_corpus(corpus: Path) -> None:
    assert {path.name for path in corpus.iterdir()} == {*SPLITS, "annotations", "synthetic.json"}
    for split, count in zip(SPLITS, (60, 8, 8), strict=True):
        rows = read_annotations(corpus, split)
        assert len(rows) == len({row["id"] for row in rows}) == count
        assert {f"{row['id']}.npz" for row in rows} == {path.name for path in (corpus / split).iterdir()}
        for row in rows:
            assert list(row) == ["id", "folder", "signer", "annotation"]
            with np.load(corpus / split / f"{row['id']}.npz", allow_pickle=False) as stored:
                features = stored["features"]
            assert features.dtype == np.float32
            assert features.shape[1] == 96
            assert 20 <= len(features) <= 60
            assert np.isfinite(features).all()
            assert 3 <= len(row["annotation"].split()) <= 6


@pytest.mark.parametrize("spec", [DEMO, SyntheticSpec(clips=300, seed=1, size="full", feature_dim=32)])
def test_every_clip_is_feasible_at_stride_4(spec: SyntheticSpec) -> None:
    for split in SPLITS:
        for index in range(spec.clips_of(split)):
            clip = invent_clip(spec, split, index)
            repeats = sum(first == second for first, second in pairwise(clip.glosses))
            assert -(-len(clip.features) // 4) >= len(clip.glosses) + repeats


@pytest.mark.parametrize("vocabulary_size", [3, 16, 40])
def test_train_shows_every_gloss_several_times(vocabulary_size: int) -> None:
    spec = SyntheticSpec(clips=60, vocabulary_size=vocabulary_size)
    seen = Counter(gloss for index in range(60) for gloss in invent_clip(spec, "train", index).glosses)
    assert len(seen) == vocabulary_size
    assert min(seen.values()) >= MIN_OCCURRENCES
    for split in ("dev", "test"):
        assert {gloss for index in range(8) for gloss in invent_clip(spec, split, index).glosses} <= set(seen)


@pytest.mark.parametrize("clips", [5, 60, 400])
def test_no_sentence_is_in_two_splits(clips: int) -> None:
    spec = SyntheticSpec(clips=clips, feature_dim=32)
    sentences = [
        {tuple(invent_clip(spec, split, index).glosses) for index in range(spec.clips_of(split))} for split in SPLITS
    ]
    assert not sentences[0] & sentences[1]
    assert not sentences[0] & sentences[2]
    assert not sentences[1] & sentences[2]


def test_dev_and_test_have_signers_that_train_has_not(corpus: Path) -> None:
    metadata = json.loads((corpus / "synthetic.json").read_text(encoding="utf-8"))
    known, unseen = set(metadata["signers"]), set(metadata["signers_unseen"])
    assert len(known | unseen) == DEMO.signers
    assert {row["signer"] for row in read_annotations(corpus, "train")} <= known
    for split in ("dev", "test"):
        signers = [row["signer"] for row in read_annotations(corpus, split)]
        assert sum(signer in unseen for signer in signers) == len(signers) // 4
        assert set(signers) & known


def test_glosses_are_skewed_and_repeat_now_and_then() -> None:
    spec = SyntheticSpec(clips=300, feature_dim=32)
    sentences = [invent_clip(spec, "train", index).glosses for index in range(300)]
    counts = Counter(gloss for sentence in sentences for gloss in sentence).most_common()
    assert counts[0][1] > 3 * counts[-1][1]
    repeats = [first == second for sentence in sentences for first, second in pairwise(sentence)]
    assert 0.02 < np.mean(repeats) < 0.12


def test_full_size_has_the_lengths_and_streams_of_phoenix() -> None:
    spec = SyntheticSpec(clips=2000, size="full")
    assert (spec.vocabulary_size, spec.feature_dim) == (1295, 6516)
    small = SyntheticSpec(clips=2000, size="full", feature_dim=32)
    clips = [invent_clip(small, "train", index) for index in range(600)]
    assert np.mean([len(clip.features) for clip in clips]) == pytest.approx(140.9, abs=7)
    assert np.mean([len(clip.glosses) for clip in clips]) == pytest.approx(11.5, abs=0.6)

    features = invent_clip(spec, "train", 0).features
    assert features.shape[1] == 6516
    assert np.allclose(np.diff(features[:, :1629], axis=0), features[1:, 1629:3258], atol=1e-3)
    assert (np.ptp(features[:, :1629], axis=0) == 0).sum() == 8


def test_hands_are_lost_now_and_then(corpus: Path) -> None:
    begin, end = json.loads((corpus / "synthetic.json").read_text(encoding="utf-8"))["streams"]["hands"]
    lost = [
        (invent_clip(DEMO, "train", index).features[:, (begin + end) // 2 : end] == 0).all(axis=1)
        for index in range(60)
    ]
    assert 0.005 < np.concatenate(lost).mean() < 0.05


def test_refuses_a_directory_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not an empty directory"):
        write_corpus(DEMO, tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_accepts_an_empty_directory(tmp_path: Path) -> None:
    write_corpus(SyntheticSpec(clips=5), tmp_path / "new" / "corpus", quiet)
    (tmp_path / "empty").mkdir()
    write_corpus(SyntheticSpec(clips=5), tmp_path / "empty", quiet)
    assert digests(tmp_path / "empty") == digests(tmp_path / "new" / "corpus")


def test_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.data.synthetic._write_npz", fail)
    with pytest.raises(InputError, match="No space left"):
        write_corpus(DEMO, tmp_path / "corpus", quiet)
    assert list(tmp_path.iterdir()) == []


def test_says_when_the_corpus_will_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GB left"):
        write_corpus(SyntheticSpec(clips=10**9, size="full"), tmp_path / "corpus", quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_summarises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--layout features --clips 12 --seed 1 --size full --vocabulary 6 --feature_dim 48 --signers 3"
    assert main([*flags.split(), "--out", str(tmp_path / "corpus")]) == 0
    printed = capsys.readouterr().out
    assert "vocabulary 6, D = 48, 3 signers" in printed
    assert [len(read_annotations(tmp_path / "corpus", split)) for split in SPLITS] == [12, 4, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--clips 4", "--clips 4: use 5 or more"),
        ("--clips many", "invalid int value: 'many'"),
        ("--clips 20 --seed -1", "--seed -1"),
        ("--clips 20 --feature_dim 3", "--feature_dim 3: use 32 or more"),
        ("--clips 20 --signers 1", "--signers 1: use 2 or more"),
        ("--clips 20 --vocabulary 2", "--vocabulary 2: use 3 or more"),
        ("--clips 20 --vocabulary 500", "20 clips can show 13 glosses 3 times each"),
        ("--clips 20 --size huge", "invalid choice: 'huge'"),
        ("--clips 20 --layout video", "invalid choice: 'video'"),
        ("--clip 20", "did you mean --clips?"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(flags: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        main([*flags.split(), "--out", str(tmp_path / "corpus")])
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        SyntheticSpec(clips=1, seed=-1, signers=1, noise=float("nan"), dropout=2.0)
    assert len(caught.value.problems) == 5


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "--feature_dim" in capsys.readouterr().out


VIDEOS = SyntheticSpec(clips=6, seed=3, vocabulary_size=3, frame_size=32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos") / "phoenix"
    write_corpus(VIDEOS, out, quiet)
    return out


def test_videos_lie_as_phoenix_lays_them(videos: Path) -> None:
    for split in SPLITS:
        with (videos / "annotations" / "manual" / f"{split}.corpus.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="|", quoting=csv.QUOTE_NONE))
        assert len(rows) == VIDEOS.clips_of(split)
        for index, row in enumerate(rows):
            assert row["folder"] == f"{row['id']}/1/*.png"
            frames = sorted((videos / "features" / "fullFrame-32x32px" / split).glob(row["folder"]))
            clip = invent_clip(VIDEOS, split, index)
            assert row["annotation"].split() == clip.glosses
            assert len(frames) == len(clip.features)
            with Image.open(frames[3]) as image:
                assert np.array_equal(np.asarray(image), clip.features[3])


def test_the_same_videos_again(videos: Path, tmp_path: Path) -> None:
    write_corpus(VIDEOS, tmp_path / "again", quiet)
    assert digests(tmp_path / "again") == digests(videos)


def test_videos_show_the_movement_of_the_features() -> None:
    features = SyntheticSpec(clips=6, seed=3, vocabulary_size=3)
    for index in range(3):
        seen, measured = invent_clip(VIDEOS, "train", index), invent_clip(features, "train", index)
        assert (seen.id, seen.signer, seen.glosses) == (measured.id, measured.signer, measured.glosses)
        assert len(seen.features) == len(measured.features)
        # Between two frames something moves, far beyond the noise of the sensor.
        assert np.median(np.abs(np.diff(seen.features.astype(int), axis=0)).max(axis=(1, 2, 3))) > 40


def test_frame_size_and_feature_dim_belong_to_their_layouts(tmp_path: Path) -> None:
    base = ["--out", str(tmp_path / "out"), "--clips", "6", "--vocabulary", "3"]
    with pytest.raises(InputError, match="--feature_dim: is for --layout features"):
        main([*base, "--layout", "phoenix2014", "--feature_dim", "64"])
    with pytest.raises(InputError, match="--frame_size: is for --layout phoenix2014"):
        main([*base, "--frame_size", "64"])
    with pytest.raises(InputError, match="--frame_size 16: use 32 or more"):
        main([*base, "--layout", "phoenix2014", "--frame_size", "16"])
    assert not (tmp_path / "out").exists()
