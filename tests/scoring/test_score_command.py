"""`signscale score` gives the right figure, or says what is wrong with the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.score import main
from trainer.errors import InputError

STM = (
    "a 1 signer01 0.0 1.79769e+308 NORD REGEN ZEIGEN-BILDSCHIRM\n"
    "b 1 signer02 0.0 1.79769e+308 IX SONNE\n"
    "c 1 signer02 0.0 1.79769e+308 WOLKE\n"
)
CTM = (
    "a 1 0.00 0.10 loc-NORD\na 1 0.10 0.10 __EMOTION__\na 1 0.20 0.10 REGEN-PLUSPLUS\na 1 0.30 0.10 ZEIGEN\n"
    "b 1 0.00 0.10 IX\nb 1 0.10 0.10 IX\nb 1 0.20 0.10 S0NNE\n"
    "c 1 0.00 0.10 WOLKE\n"
)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return written(tmp_path / "dev.stm", STM)


@pytest.fixture
def hypothesis(tmp_path: Path) -> Path:
    return written(tmp_path / "dev.ctm", CTM)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def arguments(reference: Path, hypothesis: Path, *more: str) -> list[str]:
    return ["--reference", str(reference), "--hypothesis", str(hypothesis), *more]


def score_json(capsys: pytest.CaptureFixture[str], reference: Path, hypothesis: Path, *more: str) -> dict[str, Any]:
    assert main(arguments(reference, hypothesis, "--json", *more)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert isinstance(summary, dict)
    return summary


@pytest.mark.parametrize(("protocol", "errors"), [("plain", 6), ("phoenix2014", 1), ("phoenix2014_merge", 0)])
def test_the_protocol_decides_the_errors(
    capsys: pytest.CaptureFixture[str], reference: Path, hypothesis: Path, protocol: str, errors: int
) -> None:
    summary = score_json(capsys, reference, hypothesis, "--protocol", protocol)
    assert (summary["protocol"], summary["errors"]) == (protocol, errors)
    assert summary["wer"] == pytest.approx(100 * errors / 6)
    assert (summary["reference_words"], summary["clips"], summary["missing_hypotheses"]) == (6, 3, 0)


def test_the_table_names_the_figures(capsys: pytest.CaptureFixture[str], reference: Path, hypothesis: Path) -> None:
    main(arguments(reference, hypothesis, "--protocol", "phoenix2014"))
    captured = capsys.readouterr()
    table = dict(line.strip().rsplit("  ", 1) for line in captured.out.replace("  (", " (").splitlines())
    figures = {name.strip(): value.strip() for name, value in table.items()}
    assert figures == {
        "WER": "16.67 % (phoenix2014)",
        "errors": "1",
        "substitutions": "0",
        "deletions": "0",
        "insertions": "1",
        "reference words": "6",
        "hypothesis words": "7",
        "clips": "3",
        "empty hypotheses": "0",
    }
    assert captured.err == ""


def test_missing_hypotheses_count_as_deletions_and_are_said_aloud(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reference = written(tmp_path / "x.stm", "".join(f"clip{i:02} 1 s 0.0 1.0 A B\n" for i in range(13)))
    hypothesis = written(tmp_path / "x.ctm", "clip00 1 0.0 0.1 A\nclip00 1 0.1 0.1 B\n")
    main(arguments(reference, hypothesis, "--json"))
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["deletions"], summary["errors"], summary["empty_hypotheses"]) == (24, 24, 12)
    assert summary["missing_hypotheses"] == 12
    assert "12 of 13 references have no hypothesis" in captured.err
    assert "clip01" in captured.err
    assert "clip10" in captured.err
    assert "clip11" not in captured.err


def test_a_hypothesis_of_an_unknown_clip_is_an_error_that_names_ten_and_counts_all(
    tmp_path: Path, reference: Path
) -> None:
    hypothesis = written(tmp_path / "x.ctm", CTM + "".join(f"other{i:02} 1 0.0 0.1 A\n" for i in range(12)))
    with pytest.raises(InputError, match="12 of 15 hypothesis ids are not in") as caught:
        main(arguments(reference, hypothesis))
    assert "other09" in str(caught.value)
    assert "other10" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "id|folder|signer|annotation\na|a/1/*.png|s|A B\nb|b/1/*.png|s|C\n",
        "name|video|start|end|speaker|orth|translation\n"
        'a|a/1/*.png|-1|-1|s|A B|ein "Wort, zwei\nb|b/1/*.png|-1|-1|s|C|drei\n',
        "id,glosses\na,A B\nb,C\n",
    ],
    ids=["phoenix2014", "phoenix2014t", "plain"],
)
def test_csv_files_are_scored_in_every_spelling(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    reference = written(tmp_path / "dev.corpus.csv", text)
    same = score_json(capsys, reference, written(tmp_path / "same.csv", text))
    assert (same["errors"], same["reference_words"], same["clips"]) == (0, 3, 2)
    other = score_json(capsys, reference, written(tmp_path / "x.ctm", "a 1 0.0 0.1 A\nb 1 0.0 0.1 X\n"))
    assert (other["deletions"], other["substitutions"], other["errors"]) == (1, 1, 2)


def test_a_hypothesis_csv_may_hold_clips_without_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, reference: Path
) -> None:
    hypothesis = written(tmp_path / "x.csv", "id,glosses\na,\nb,IX SONNE\nc,\n")
    summary = score_json(capsys, reference, hypothesis)
    assert (summary["deletions"], summary["errors"], summary["empty_hypotheses"]) == (4, 4, 2)
    assert summary["missing_hypotheses"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,glosses\na,A,B\n", r"x\.csv:2: malformed line, expected 2 fields separated by ','.*found 3"),
        ("id,glosses\na,A\nb,B\na,A\n", r"x\.csv:4: duplicate id a"),
        ("a,A B\nb,C\n", r"x\.csv:1: expected a header"),
        ("", "empty file"),
    ],
)
def test_a_malformed_hypothesis_csv_is_refused(tmp_path: Path, reference: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(arguments(reference, written(tmp_path / "x.csv", text)))


def test_swapped_arguments_are_recognised(reference: Path, hypothesis: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="swapped") as caught:
        main(arguments(hypothesis, reference))
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError, match=r"--hypothesis.*expected \.ctm or \.csv.*swapped"):
        main(arguments(written(tmp_path / "x.csv", "id,glosses\na,A\n"), reference))


def test_a_missing_file_is_named(reference: Path, hypothesis: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.ctm: no such file"):
        main(arguments(reference, tmp_path / "gone.ctm"))
    with pytest.raises(InputError, match=r"gone\.csv"):
        main(arguments(tmp_path / "gone.csv", hypothesis))


def test_an_unknown_protocol_lists_the_known_ones(reference: Path, hypothesis: Path) -> None:
    with pytest.raises(InputError, match="phoenix2014_merge"):
        main(arguments(reference, hypothesis, "--protocol", "phoenix"))


def test_an_unknown_option_names_the_nearest(reference: Path, hypothesis: Path) -> None:
    with pytest.raises(InputError, match="did you mean --hypothesis"):
        main(["--reference", str(reference), "--hypotesis", str(hypothesis)])


def test_a_users_mistake_leaves_with_code_2_and_no_traceback(reference: Path, hypothesis: Path) -> None:
    command = [sys.executable, "-m", "launch.score", *arguments(hypothesis, reference)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "swapped" in result.stderr
    assert "Traceback" not in result.stderr


def test_scoring_csv_files_imports_no_torch(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "id,glosses\na,A\n")
    code = (
        f"import sys; from launch.score import main; main({arguments(path, path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
