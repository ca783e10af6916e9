"""The vocabulary: the same glosses give the same classes, and a foreign or damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.vocabulary import BLANK, UnknownGlossError, Vocabulary
from trainer.errors import InputError


def test_classes_depend_on_the_glosses_alone() -> None:
    vocabulary = Vocabulary.build([("WIND", "REGEN"), ("ÜBER", "WIND")])
    assert vocabulary.glosses == ("REGEN", "WIND", "ÜBER")
    assert len(vocabulary) == 4
    assert vocabulary.encode(["WIND", "WIND", "ÜBER"]) == [2, 2, 3]
    assert vocabulary.decode([2, 2, 3]) == ["WIND", "WIND", "ÜBER"]
    assert vocabulary == Vocabulary(["ÜBER", "REGEN", "WIND"])
    assert vocabulary.fingerprint == Vocabulary(["ÜBER", "REGEN", "WIND"]).fingerprint


@pytest.mark.parametrize("spelling", ["<blank>", "blank", "<eps>", "0", "_", "-"])
def test_no_gloss_is_mistaken_for_the_blank(tmp_path: Path, spelling: str) -> None:
    vocabulary = Vocabulary([spelling])
    assert vocabulary.encode([spelling]) == [1]
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json").encode([spelling]) == [1]


def test_an_unknown_gloss_never_becomes_a_class() -> None:
    vocabulary = Vocabulary(["REGEN"])
    assert vocabulary.unknown(["REGEN", "SCHNEE", "SCHNEE"]) == {"SCHNEE"}
    assert "SCHNEE" not in vocabulary
    with pytest.raises(UnknownGlossError, match="does not hold: HAGEL, SCHNEE"):
        vocabulary.encode(["SCHNEE", "REGEN", "HAGEL"])


@pytest.mark.parametrize("index", [BLANK, 2, -1])
def test_a_class_without_a_gloss_is_not_decoded(index: int) -> None:
    with pytest.raises(ValueError, match=f"class {index} stands for no gloss"):
        Vocabulary(["REGEN"]).decode([1, index])


@pytest.mark.parametrize("glosses", [[], ["REGEN", ""]])
def test_a_vocabulary_without_glosses_or_with_an_empty_one_is_refused(glosses: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one gloss"):
        Vocabulary(glosses)


def test_a_saved_vocabulary_comes_back_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text("an older file")
    vocabulary = Vocabulary(["ÜBER", 'A"B', "REGEN"])
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary
    assert Vocabulary.load(path).fingerprint == vocabulary.fingerprint
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vocabulary.json"
    Vocabulary(["REGEN"]).save(path)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("trainer.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Vocabulary(["WIND"]).save(path)
    assert Vocabulary.load(path).glosses == ("REGEN",)
    assert list(tmp_path.iterdir()) == [path]


def test_a_vocabulary_changed_on_disk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    Vocabulary(["REGEN", "WIND"]).save(path)
    path.write_text(path.read_text().replace("WIND", "WAND"))
    with pytest.raises(
        InputError, match=r"vocabulary\.json: expected the vocabulary with fingerprint .* or train anew"
    ):
        Vocabulary.load(path)
    path.write_text(
        json.dumps({"glosses": ["WIND", "REGEN"], "fingerprint": Vocabulary(["REGEN", "WIND"]).fingerprint})
    )
    with pytest.raises(InputError, match="the file changed after the run wrote it"):
        Vocabulary.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"glosses": 3, "fingerprint": ""}', "\udcff"])
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        InputError, match=r"vocabulary\.json: expected a vocabulary as JSON, found a damaged file; restore"
    ):
        Vocabulary.load(path)


def test_a_missing_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: vocabulary cannot be read \(No such file"):
        Vocabulary.load(tmp_path / "absent.json")


def test_another_vocabulary_is_refused_by_naming_the_differences() -> None:
    ours = Vocabulary(["REGEN", "WIND", *(f"A{index:02}" for index in range(12))])
    theirs = Vocabulary(["REGEN", "SCHNEE"])
    ours.check_same(Vocabulary(reversed(ours.glosses)), "last.json")
    with pytest.raises(InputError) as caught:
        ours.check_same(theirs, "runs/a/vocabulary.json")
    message = str(caught.value)
    assert message.startswith("runs/a/vocabulary.json: expected the 14 glosses of this run")
    assert "13 missing there: A00, A01, " in message
    assert "A09 and 3 more (13 in all)" in message
    assert "1 only there: SCHNEE" in message
    assert "use the annotations it was trained with, or train anew" in message
