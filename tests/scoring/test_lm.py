"""N-gram language models: backoff as in the definition, and ARPA files that are wrong in one line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import InputError
from trainer.scoring.lm import read_arpa

TRIGRAM = """\
any text before the head

\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-99\t<s>\t-0.3
-0.8\t</s>
-0.5\tA\t-0.2
-0.6\tB\t-0.1
-1.4\tRARE

\\2-grams:
-0.2\t<s> A\t-0.15
-0.4\tA B\t-0.25
-0.7\tB A
-0.3\tB </s>

\\3-grams:
-0.1\t<s> A B
-0.05\tA B A

\\end\\
"""


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    path = tmp_path / "glosses.arpa"
    path.write_text(TRIGRAM)
    return path


def test_probabilities_back_off_as_defined(arpa: Path) -> None:
    model = read_arpa(arpa, ["A", "B", "C"])
    log10 = lambda state: model.scores(state) / math.log(10.0)  # noqa: E731
    # Class 0 is </s>; C is unknown to the model and counts as its rarest word.
    assert model.unknown == ["C"]
    assert log10(()) == pytest.approx([-0.8, -0.5, -0.6, -1.4])
    assert log10(("<s>",)) == pytest.approx([-1.1, -0.2, -0.9, -1.7])
    assert log10(("<s>", "A")) == pytest.approx([-0.15 - 0.2 - 0.8, -0.15 - 0.2 - 0.5, -0.1, -0.15 - 0.2 - 1.4])
    assert log10(("A", "B")) == pytest.approx([-0.25 - 0.3, -0.05, -0.25 - 0.1 - 0.6, -0.25 - 0.1 - 1.4])
    # A context that no file lists costs nothing to leave.
    assert log10(("RARE", "A")) == pytest.approx(log10(("A",)))


def test_states_are_as_long_as_the_order_asks(arpa: Path) -> None:
    model = read_arpa(arpa, ["A", "B"])
    assert model.start == ("<s>",)
    assert model.advance(model.start, 1) == ("<s>", "A")
    assert model.advance(("<s>", "A"), 2) == ("A", "B")


def test_a_unigram_model_has_one_state(tmp_path: Path) -> None:
    path = tmp_path / "unigram.arpa"
    path.write_text("\\data\\\nngram 1=2\n\\1-grams:\n-0.5 A\n-0.7 <unk>\n\\end\\\n")
    model = read_arpa(path, ["A", "B"])
    assert model.start == model.advance((), 1) == ()
    assert np.exp(model.scores(())) == pytest.approx([10**-0.7, 10**-0.5, 10**-0.7])


def test_n_grams_of_unknown_words_hold_for_every_gloss_that_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "bigram.arpa"
    path.write_text(
        "\\data\\\nngram 1=3\nngram 2=2\n\\1-grams:\n-0.5 A -0.1\n-0.7 <unk> -0.2\n-0.4 </s>\n"
        "\\2-grams:\n-0.3 A <unk>\n-0.2 <unk> A\n\\end\\\n"
    )
    model = read_arpa(path, ["A", "B", "C"])
    log10 = model.scores(("A",)) / math.log(10.0)
    assert log10 == pytest.approx([-0.5, -0.6, -0.3, -0.3])
    assert (model.scores(model.advance((), 3)) / math.log(10.0))[1] == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-0.6\tB\t-0.1", "-0.6x\tB\t-0.1", ":12: expected 'log10(p) word [log10(backoff)]', found '-0.6x"),
        ("-0.4\tA B\t-0.25", "-0.4\tA", ":17: expected 'log10(p) word word [log10(backoff)]', found '-0.4"),
        ("-0.6\tB\t-0.1", "0.6\tB\t-0.1", ":12: expected log10 of a probability, 0 or less"),
        ("-0.6\tB\t-0.1", "-0.6\tB\tinf", ":12: expected log10 of a probability"),
        ("-0.6\tB\t-0.1", "nan\tB", ":12: expected log10 of a probability"),
        ("-0.6\tB\t-0.1", "-0.6\tA\t-0.1", ":12: 'A' was listed before"),
        ("-0.7\tB A", "-0.7\tB Z", ":18: 'Z' is not among the 1-grams"),
        ("ngram 2=4", "ngram 2=5", ":21: expected 5 2-grams before this line, found 4"),
        ("ngram 2=4", "ngram 4=4", ":5: expected 'ngram 2=COUNT', found 'ngram 4=4'"),
        ("\\2-grams:", "\\3-grams:", ":15: expected \\2-grams:, found '\\\\3-grams:'"),
        ("\n\\end\\\n", "\n", ":23: expected \\end\\ after this line, found the end of the file"),
        ("\\data\\", "data", "expected an ARPA file with \\data\\"),
        ("ngram 1=5\nngram 2=4\nngram 3=2\n", "", ":5: expected ngram 1=COUNT, found '\\\\1-grams:'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(arpa: Path, old: str, new: str, message: str) -> None:
    assert TRIGRAM.count(old) == 1
    arpa.write_text(TRIGRAM.replace(old, new))
    with pytest.raises(InputError) as caught:
        read_arpa(arpa, ["A", "B"])
    (problem,) = caught.value.problems
    assert message in problem
    assert str(arpa) in problem


def test_a_file_that_is_missing_binary_or_of_other_words_is_refused(arpa: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_arpa(tmp_path / "none.arpa", ["A"])
    with pytest.raises(InputError, match="holds none of the 2 glosses of the vocabulary"):
        read_arpa(arpa, ["a", "b"])
    (tmp_path / "kenlm.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\x00\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_arpa(tmp_path / "kenlm.bin", ["A"])
