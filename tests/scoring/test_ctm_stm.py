"""CTM and STM files: what is written is what is read, and what cannot be read says where and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.errors import InputError
from trainer.scoring.ctm_stm import (
    CtmRow,
    StmRow,
    read_ctm,
    read_stm,
    read_transcripts,
    untimed_ctm_rows,
    write_ctm,
    write_stm,
)

token = st.text(min_size=1, max_size=8).filter(
    lambda text: text.split() == [text] and text != "[EMPTY]" and not text.startswith(";;") and text.isprintable()
)
transcripts = st.dictionaries(token, st.lists(token, max_size=30), max_size=6)
same_file = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@same_file
@given(transcripts.filter(bool))
def test_references_survive_a_round_trip_in_order(tmp_path: Path, references: dict[str, list[str]]) -> None:
    path = tmp_path / "x.stm"
    write_stm(path, [StmRow(id=clip_id, glosses=words) for clip_id, words in references.items()])
    assert list(read_stm(path).items()) == list(references.items())


@same_file
@given(transcripts)
def test_hypotheses_survive_a_round_trip_but_for_the_empty_ones(
    tmp_path: Path, hypotheses: dict[str, list[str]]
) -> None:
    path = tmp_path / "x.ctm"
    write_ctm(path, [row for clip_id, words in hypotheses.items() for row in untimed_ctm_rows(clip_id, words)])
    assert read_ctm(path) == {clip_id: words for clip_id, words in hypotheses.items() if words}


def test_an_stm_line_is_spelled_as_the_corpus_spells_it(tmp_path: Path) -> None:
    path = tmp_path / "dev.stm"
    write_stm(path, [StmRow(id="24June_2011-9", signer="signer05", glosses=("NORDOST", "IX", "__OFF__"))])
    assert path.read_bytes() == b"24June_2011-9 1 signer05 0 1.79769e+308 NORDOST IX __OFF__\n"


def test_a_ctm_line_holds_one_word_its_times_and_its_confidence(tmp_path: Path) -> None:
    path = tmp_path / "dev.ctm"
    write_ctm(
        path,
        [
            CtmRow(id="a", gloss="NORD", start=0.16, duration=0.32),
            CtmRow(id="a", gloss="WIND", start=10.2, duration=0.16, confidence=0.5),
        ],
    )
    assert path.read_text() == "a 1 0000.160 0.320 NORD\na 1 0010.200 0.160 WIND 0.5000\n"


def test_start_times_sort_as_text_as_they_sort_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.ctm"
    write_ctm(path, [CtmRow(id="a", gloss="G", start=start, duration=0.1) for start in (0.5, 9.8, 10.2, 100.0)])
    starts = [line.split()[2] for line in path.read_text().splitlines()]
    assert starts == sorted(starts)


def test_the_corpus_own_lines_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "dev.STM",
        ";; a comment\n\n29July_2010-7 1 signer05 0.0 1.79769e+308 __ON__ TEMPERATUR WIE-AUSSEHEN\r\n"
        "  24June_2011-9\t1 signer05 0.0 1.79769e+308 S+H\nsilent 1 signer01 0.0 2.5\n",
    )
    assert read_transcripts(path) == {
        "29July_2010-7": ["__ON__", "TEMPERATUR", "WIE-AUSSEHEN"],
        "24June_2011-9": ["S+H"],
        "silent": [],
    }


def test_words_are_sorted_by_start_time_as_numbers_and_equal_times_keep_their_order(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x.ctm",
        ";; out of order, interleaved\na 1 10.2 0.1 D\nb 1 0.5 0.1 X 0.93\na 1 9.8 0.1 C\na 1 9.8 0.2 B\n"
        "a 1 1e0 0.1 A\n",
    )
    assert read_ctm(path) == {"a": ["A", "C", "B", "D"], "b": ["X"]}


def test_the_corpus_tools_empty_marker_is_no_word(tmp_path: Path) -> None:
    assert read_ctm(written(tmp_path / "x.ctm", "a 1 0.000 0.030 [EMPTY]\nb 1 0.0 0.1 X\n")) == {
        "a": [],
        "b": ["X"],
    }


def test_a_model_without_a_word_to_say_is_told_from_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ctm"
    write_ctm(path, [])
    assert read_ctm(path) == {}
    assert path.read_text().startswith(";;")


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path: Path) -> None:
    path = tmp_path / "x.ctm"
    path.write_bytes(b"\xef\xbb\xbfa 1 0.0 0.1 X\n")
    assert read_ctm(path) == {"a": ["X"]}


@pytest.mark.parametrize(
    "line",
    [
        "a 1 0.0 0.1",
        "a 1 0.0 0.1 NORD WIND",
        "a 1 0.0 0.1 NORD 0.9 lex",
        "a 1 zero 0.1 NORD",
        "a 1 nan 0.1 NORD",
        "a 1 signer05 0.0 1.79769e+308 NORD",
    ],
)
def test_a_malformed_ctm_line_is_named_with_what_was_expected_and_found(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "x.ctm", f";; comment\na 1 0.0 0.1 X\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_ctm(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:3: expected 'id channel start duration GLOSS [confidence]'")
    assert line in problem


@pytest.mark.parametrize("line", ["b 1 signer05 0.0", "b 1 signer05 0.0 NORD", "b 1 0.16 0.32 NORD", "b|c|d|NORD"])
def test_a_malformed_stm_line_is_named_with_what_was_expected_and_found(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "x.stm", f"a 1 s 0.0 1.0 X\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_stm(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:2: expected 'id channel signer start end GLOSS ...'")
    assert line in problem


def test_all_malformed_lines_are_reported_at_once_up_to_ten(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ctm", "broken\n" * 25)
    with pytest.raises(InputError) as caught:
        read_ctm(path)
    assert len(caught.value.problems) == 11
    assert "15 more" in caught.value.problems[-1]


def test_a_duplicate_reference_is_named_with_both_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "x.stm", "a 1 s 0.0 1.0 X\nb 1 s 0.0 1.0 X\na 1 s 0.0 1.0 Y\n")
    with pytest.raises(InputError, match=r"x\.stm:3: duplicate id a, first in line 1"):
        read_stm(path)


@pytest.mark.parametrize("read", [read_stm, read_ctm])
def test_empty_missing_and_unreadable_files_are_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match="empty file"):
        read(written(tmp_path / "empty", "\n \n"))
    with pytest.raises(InputError, match="gone: no such file"):
        read(tmp_path / "gone")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin").write_bytes("a 1 s 0.0 1.0 ÜBER\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read(tmp_path / "latin")


def test_references_of_comments_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only comments"):
        read_stm(written(tmp_path / "x.stm", ";; nothing\n"))


def test_the_extension_chooses_the_reader(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "whatever")
    assert read_transcripts(path, read_csv=lambda _: {"a": ["X"]}) == {"a": ["X"]}
    with pytest.raises(InputError, match=r"expected a file ending in \.stm, \.ctm, found '\.csv'"):
        read_transcripts(path)
    with pytest.raises(InputError, match=r"\.stm, \.ctm, \.csv, found '\.txt'"):
        read_transcripts(tmp_path / "x.txt", read_csv=lambda _: {})


@pytest.mark.parametrize("bad", ["", "A B", "A\n", "\u00a0", "[EMPTY]", ";;"])
def test_what_the_formats_cannot_hold_is_never_written(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="cannot be written"):
        write_ctm(path, untimed_ctm_rows("a", [bad]))
    with pytest.raises(ValueError, match="cannot be written"):
        write_ctm(path, untimed_ctm_rows(bad, ["X"]))
    with pytest.raises(ValueError, match="cannot be written"):
        write_stm(path, [StmRow(id="a", signer=bad, glosses=[])])
    with pytest.raises(ValueError, match="cannot be written"):
        write_stm(path, [StmRow(id="a", glosses=["X", bad])])
    with pytest.raises(ValueError, match="duplicate id 'a'"):
        write_stm(path, [StmRow(id="a", glosses=[]), StmRow(id="a", glosses=[])])
    assert not path.exists()
