"""Annotation files: every spelling in circulation is read, every mistake is named with its line and mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.data.annotations import find_annotation_file, read_annotation_file
from trainer.errors import InputError

PHOENIX_2014 = "id|folder|signer|annotation\n"
PHOENIX_2014T = "name|video|start|end|speaker|orth|translation\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        read_annotation_file(path)
    return caught.value.problems


@pytest.mark.parametrize(
    ("content", "folder", "signer"),
    [
        pytest.param(PHOENIX_2014 + "c-0|c-0/1/*.png|Signer04|ABER REGEN\n", "c-0/1/*.png", "Signer04", id="2014"),
        pytest.param(
            PHOENIX_2014T + 'c-0|c-0/1/*.png|-1|-1|Signer04|ABER REGEN|aber "regen\n',
            "c-0/1/*.png",
            "Signer04",
            id="2014T",
        ),
        pytest.param(
            "id|folder|signer|annotation|translation\nc-0|c-0/*.png|Signer04|ABER REGEN|aber, regen\n",
            "c-0/*.png",
            "Signer04",
            id="2014T, other spelling",
        ),
        pytest.param("id,glosses\nc-0,ABER REGEN\n", "", "", id="plain"),
        pytest.param('id,path,Gloss\n"c-0","a,b.mp4","ABER REGEN"\n', "a,b.mp4", "", id="quoted"),
        pytest.param("glosses\tsigner\tid\n ABER  REGEN \tSigner04\tc-0\n", "", "Signer04", id="tabs"),
    ],
)
def test_spellings_in_circulation_are_read(tmp_path: Path, content: str, folder: str, signer: str) -> None:
    [annotation] = read_annotation_file(write(tmp_path / "train.csv", content))
    assert annotation.id == "c-0"
    assert annotation.glosses == ("ABER", "REGEN")
    assert (annotation.folder, annotation.signer, annotation.line) == (folder, signer, 2)


def test_frames_written_as_whole_floats_are_frames_and_a_gap_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "id,glosses,num_frames\na,X,120.0\nb,X,\nc,X,7\n")
    assert [annotation.num_frames for annotation in read_annotation_file(path)] == [120, None, 7]
    path = write(tmp_path / "bad.csv", "id,glosses,num_frames\na,X,7.5\n")
    assert "expected the number of frames in column `num_frames`, found '7.5'" in problems_of(path)[0]


def test_byte_order_mark_windows_line_ends_blank_lines_and_umlauts_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.csv", b"\xef\xbb\xbfid,glosses\r\n\r\na,\xc3\x9cBER\r\ntrain/b,REGEN\r\n\r\n")
    annotations = read_annotation_file(path)
    assert [(a.id, a.glosses, a.line) for a in annotations] == [
        ("a", ("ÜBER",), 3),
        ("train/b", ("REGEN",), 4),
    ]


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.corpus.csv",
        PHOENIX_2014
        + "a|f|s|REGEN\n"  # 2
        + "b|f|REGEN\n"  # 3: a field short
        + "|f|s|REGEN\n"  # 4: empty id
        + "c|f|s|  \n"  # 5: empty annotation
        + "a|f|s|WIND\n",  # 6: duplicate id
    )
    malformed, empty_id, empty_annotation, duplicate = problems_of(path)
    assert malformed.startswith(f"{path}:3: malformed line, expected 4 fields separated by '|'")
    assert "found 3: 'b|f|REGEN'; add or remove delimiters" in malformed
    assert empty_id.startswith(f"{path}:4: empty id")
    assert "remove the line" in empty_id
    assert empty_annotation.startswith(f"{path}:5: empty annotation of clip c")
    assert "column `annotation`; add its glosses" in empty_annotation
    assert duplicate.startswith(f"{path}:6: duplicate id a, first found on line 2")
    assert "remove or rename line 2 or line 6" in duplicate


def test_long_reports_are_counted_not_printed_in_full(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "id,glosses\n" + "x\n" * 60)
    problems = problems_of(path)
    assert len(problems) == 51
    assert problems[-1] == f"{path}: and 10 more problems like these"


@pytest.mark.parametrize("line", ["a,REGEN, WIND", '"a,REGEN'])
def test_a_comma_too_many_or_an_open_quote_is_a_malformed_line(tmp_path: Path, line: str) -> None:
    [problem] = problems_of(write(tmp_path / "train.csv", f"id,glosses\n{line}\n"))
    assert ":2: malformed line, expected 2 fields" in problem
    assert "quote a field that holds a comma" in problem


def test_text_that_is_not_utf8_is_named_with_byte_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "id,glosses\na,REGEN\nb,ÜBER\n".encode("latin-1"))
    [problem] = problems_of(path)
    assert problem.startswith(f"{path}:3: expected UTF-8, found byte 0xdc at position 3")
    assert "iconv" in problem


def test_a_utf16_file_is_refused(tmp_path: Path) -> None:
    [problem] = problems_of(write(tmp_path / "train.csv", "id,glosses\na,REGEN\n".encode("utf-16")))
    assert ":1: expected UTF-8, found byte 0xff" in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ":1: an empty file; expected a header such as `id|folder|signer|annotation`"),
        ("\ufeff\n\n", ":1: an empty file"),
        (PHOENIX_2014, ":1: expected one line per clip, found only the header; add the clips"),
    ],
)
def test_a_file_without_clips_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    path = write(tmp_path / "train.csv", content)
    [problem] = problems_of(path)
    assert problem.startswith(f"{path}{expected}")


def test_a_missing_header_is_refused_column_by_column(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "c-0|c-0/1/*.png|Signer04|ABER\n")
    no_id, no_glosses = problems_of(path)
    assert no_id.startswith(f"{path}:1: expected a header with a column `id` or `name`, found the columns c-0")
    assert "a column `annotation` or `glosses`" in no_glosses
    assert "give the file a header such as" in no_glosses


@pytest.mark.parametrize("header", ["id,gloss,glosses", "id,gloss,gloss", "id,id,gloss"])
def test_ambiguous_columns_are_refused(tmp_path: Path, header: str) -> None:
    [problem] = problems_of(write(tmp_path / "train.csv", f"{header}\na,b,c\n"))
    assert ":1: expected one column for the" in problem
    assert "rename all but one" in problem


@pytest.mark.parametrize("clip_id", ["../a", "/etc/a", "a/../../b", "a//b", "./a", "..\\a"])
def test_an_id_that_leaves_the_data_directory_is_refused(tmp_path: Path, clip_id: str) -> None:
    [problem] = problems_of(write(tmp_path / "train.csv", f"id,glosses\n{clip_id},REGEN\n"))
    assert ":2: id" in problem
    assert "leaves the split's folder" in problem


@pytest.mark.parametrize("clip_id", ["a b", "a\x00b"])
def test_an_id_that_score_files_cannot_hold_is_refused(tmp_path: Path, clip_id: str) -> None:
    [problem] = problems_of(write(tmp_path / "train.csv", f"id|glosses\n{clip_id}|REGEN\n"))
    assert ":2: id" in problem
    assert "mend the id" in problem


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path / "absent.csv")
    assert "absent.csv: cannot be read (No such file or directory)" in problem


@pytest.mark.parametrize(
    "name",
    [
        "dev.corpus.csv",
        "dev.SI5.corpus.csv",
        "dev.si5.corpus.csv",
        "PHOENIX-2014-T.dev.corpus.csv",
        "dev.csv",
        "dev.tsv",
    ],
)
def test_a_directory_serves_each_split_its_file(tmp_path: Path, name: str) -> None:
    for split in ("train", "dev"):
        write(tmp_path / name.replace("dev", split), "")
    assert find_annotation_file(str(tmp_path), "dev") == tmp_path / name


def test_a_pattern_serves_each_split_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.SI5.corpus.csv", "")
    write(tmp_path / "dev.corpus.csv", "")
    assert find_annotation_file(f"{tmp_path}/{{split}}.SI5.corpus.csv", "dev") == path


def test_several_files_for_a_split_ask_for_a_pattern(tmp_path: Path) -> None:
    write(tmp_path / "dev.corpus.csv", "")
    write(tmp_path / "dev.SI5.corpus.csv", "")
    with pytest.raises(InputError) as caught:
        find_annotation_file(str(tmp_path), "dev")
    message = str(caught.value)
    assert "found dev.SI5.corpus.csv, dev.corpus.csv" in message
    assert f"--annotations '{tmp_path}/{{split}}.SI5.corpus.csv'" in message


def test_a_directory_without_the_split_lists_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "train.corpus.csv", "")
    with pytest.raises(InputError) as caught:
        find_annotation_file(str(tmp_path), "dev")
    message = str(caught.value)
    assert f"annotations of split dev: {tmp_path} holds none of dev.corpus.csv, dev.SI5.corpus.csv, " in message
    assert "PHOENIX-2014-T.dev.corpus.csv, dev.csv, dev.tsv; add one" in message


def test_a_missing_path_and_a_single_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent/dev\.csv does not exist; give --annotations"):
        find_annotation_file(f"{tmp_path}/absent/{{split}}.csv", "dev")
    path = write(tmp_path / "train.csv", "")
    with pytest.raises(InputError, match="one file, which would serve every split alike; give --annotations"):
        find_annotation_file(str(path), "dev")
