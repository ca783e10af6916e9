"""The corpus: every annotated clip is found, or all that is wrong is said at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.data.corpus import Clip, feature_dim, min_output_frames, read_split
from trainer.errors import InputError

ASL_COFFEE = Path(__file__).parents[3] / "shared/data/asl_coffee"


class Corpus:
    """A small corpus on disk: clips c00, c01, … of 10, 11, … frames."""

    def __init__(self, root: Path, num_clips: int = 3, dim: int = 4) -> None:
        self.root = root
        self.ids = [f"c{index:02}" for index in range(num_clips)]
        for index, clip_id in enumerate(self.ids):
            self.add(clip_id, np.zeros((10 + index, dim), np.float32))
        self.annotate(self.ids)
        self.log: list[str] = []

    def path(self, clip_id: str) -> Path:
        return self.root / f"train/{clip_id}.npz"

    def add(self, clip_id: str, features: np.ndarray) -> None:
        self.path(clip_id).parent.mkdir(parents=True, exist_ok=True)
        np.savez(self.path(clip_id), features=features)

    def annotate(self, ids: list[str]) -> None:
        lines = "".join(f"{clip_id}|{clip_id}/*.png|Signer01|REGEN WIND\n" for clip_id in ids)
        (self.root / "train.corpus.csv").write_text("id|folder|signer|annotation\n" + lines)

    def read(self, *, allow_missing: bool = False, expected_dim: int | None = None) -> list[Clip]:
        return read_split(
            self.root,
            str(self.root),
            "train",
            allow_missing=allow_missing,
            log=self.log.append,
            expected_dim=expected_dim,
        )

    def problems(self, *, allow_missing: bool = False, expected_dim: int | None = None) -> tuple[str, ...]:
        with pytest.raises(InputError) as caught:
            self.read(allow_missing=allow_missing, expected_dim=expected_dim)
        return caught.value.problems


def test_clips_come_in_the_order_of_the_annotations(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.annotate(["c02", "c00", "c01"])
    clips = corpus.read()
    assert [(clip.id, clip.num_frames) for clip in clips] == [("c02", 12), ("c00", 10), ("c01", 11)]
    assert clips[1] == Clip(
        id="c00",
        split="train",
        signer="Signer01",
        num_frames=10,
        glosses=("REGEN", "WIND"),
        source=tmp_path / "train/c00.npz",
    )
    assert feature_dim(clips) == 4
    assert corpus.log == []


@pytest.mark.parametrize("stored_as", ["train/a", "a"])
def test_names_that_begin_with_the_split_are_found_in_either_place(tmp_path: Path, stored_as: str) -> None:
    corpus = Corpus(tmp_path, num_clips=0)
    corpus.add(stored_as, np.zeros((9, 4), np.float32))
    corpus.annotate(["train/a"])
    [clip] = corpus.read()
    assert (clip.id, clip.num_frames, clip.source) == ("train/a", 9, corpus.path(stored_as))


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/linked").symlink_to(tmp_path / "elsewhere")
    corpus.annotate(["linked/c00"])
    assert [clip.num_frames for clip in corpus.read()] == [10]


def test_missing_feature_files_are_named_and_counted(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, num_clips=1)
    corpus.annotate(["c00", *(f"gone{index:02}" for index in range(12))])
    [problem] = corpus.problems()
    assert problem.startswith(f"{tmp_path}/train: 12 of 13 annotated clips have no feature file: gone00 (line 3), ")
    assert "gone09 (line 12) and 2 more (12 in all)" in problem
    assert "gone10" not in problem
    assert f"expected {tmp_path}/train/gone00.npz, for one" in problem
    assert "drop them with --allow_missing" in problem


def test_allow_missing_drops_clips_aloud(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, num_clips=2)
    corpus.annotate(["gone", "c01"])
    assert [clip.id for clip in corpus.read(allow_missing=True)] == ["c01"]
    [said] = corpus.log[:1]
    assert "1 of 2 annotated clips have no feature file: gone (line 2); dropped" in said


def test_allow_missing_never_drops_every_clip(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, num_clips=1)
    corpus.annotate(["gone", "lost"])
    [problem] = corpus.problems(allow_missing=True)
    assert "2 of 2 annotated clips have no feature file: gone (line 2), lost (line 3)" in problem
    assert "mend --data_dir, or the ids, none of which has a file" in problem


def test_a_missing_or_empty_split_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, num_clips=0)
    corpus.annotate(["c00"])
    [problem] = corpus.problems(allow_missing=True)
    assert f"{tmp_path}/train: expected the feature files <id>.npz of split train, found no such folder" in problem
    assert "mend --data_dir" in problem
    (tmp_path / "train").mkdir()
    [problem] = corpus.problems()
    assert "found an empty folder" in problem


def test_a_split_without_annotations_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    (tmp_path / "train.corpus.csv").unlink()
    [problem] = corpus.problems()
    assert f"annotations of split train: {tmp_path} holds none of train.corpus.csv" in problem


def test_feature_files_without_annotation_are_said_aloud(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, num_clips=6)
    corpus.annotate(["c00"])
    assert len(corpus.read()) == 1
    [said] = corpus.log
    assert "5 feature files without an annotation are left out: c01.npz, c02.npz, c03.npz and 2 more" in said


def test_differing_dimensions_are_named_beside_the_majority(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.add("c01", np.zeros((11, 7), np.float32))
    [problem] = corpus.problems()
    assert f"{tmp_path}/train: expected D = 4, as in 2 of 3 files, found another D in 1: c01.npz (D = 7)" in problem
    assert "extract them anew" in problem


def test_a_split_is_held_to_the_dimensions_of_the_training_split(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    assert len(corpus.read(expected_dim=4)) == 3
    [problem] = corpus.problems(expected_dim=5)
    assert "expected D = 5, as in the training split, found another D in 3: c00.npz (D = 4), " in problem


def test_two_ids_of_one_file_are_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.annotate(["c00", "c01", "train/c00"])
    [problem] = corpus.problems()
    assert "c00.npz: expected to serve one clip, found two: c00 (line 2) and train/c00 (line 4)" in problem


def test_bad_files_are_named_up_to_ten_and_counted(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, num_clips=14)
    for clip_id in corpus.ids[:12]:
        corpus.path(clip_id).write_bytes(b"PK")
    problems = corpus.problems()
    assert len(problems) == 11
    assert "c00.npz: expected an npz file" in problems[0]
    assert problems[-1] == f"{tmp_path}/train: and 2 more bad files (12 in all)"


def test_problems_of_all_kinds_are_reported_together(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, num_clips=5)
    corpus.annotate([*corpus.ids, "gone"])
    corpus.path("c00").write_bytes(corpus.path("c00").read_bytes()[:-50])
    corpus.add("c01", np.zeros((11, 7), np.float32))
    np.savez(corpus.path("c02"), features=np.array([None]))
    missing, truncated, pickled, other_dim = corpus.problems()
    assert "gone (line 7)" in missing
    assert "c00.npz: expected an npz file" in truncated
    assert "c02.npz: array `features`: expected floats, found pickled" in pickled
    assert "c01.npz (D = 7)" in other_dim


def test_bad_annotations_do_not_hide_bad_files(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.annotate(["c00", "c00"])
    corpus.path("c01").write_bytes(b"")
    duplicate, bad_file = corpus.problems()
    assert "train.corpus.csv:3: duplicate id c00" in duplicate
    assert "c01.npz" in bad_file
    assert corpus.log == []


@pytest.mark.parametrize(
    ("glosses", "expected"), [("", 0), ("A", 1), ("A B A", 3), ("A A", 3), ("A A A B B", 8), ("A A B A", 5)]
)
def test_ctc_needs_a_frame_per_gloss_and_a_blank_between_repeats(glosses: str, expected: int) -> None:
    assert min_output_frames(glosses.split()) == expected


@pytest.mark.skipif(not ASL_COFFEE.is_dir(), reason="the asl_coffee recordings are not beside the repository")
def test_real_recordings_are_read_in_full() -> None:
    said: list[str] = []
    sizes = {}
    for split in ("train", "dev", "test"):
        clips = read_split(
            ASL_COFFEE,
            str(ASL_COFFEE / "annotations"),
            split,
            allow_missing=False,
            log=said.append,
            expected_dim=134,
        )
        sizes[split] = len(clips)
        assert all(clip.num_frames >= min_output_frames(clip.glosses) for clip in clips)
    assert sizes == {"train": 214, "dev": 31, "test": 64}
    assert said == []
