"""Bad input gets one clear error that names what, where and the mend, before anything is written: exit code 2."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY, launch, reset_process, train
from trainer.errors import InputError
from trainer.evaluate import main as evaluate_main
from trainer.train import main

# Trains with RANK in its flags replaced by the rank's number: every rank has a corpus folder of its own.
OWN_CORPUS = """
import os, sys
from trainer.exits import exit_on_input_error
from trainer.train import main
exit_on_input_error(lambda: main([flag.replace("RANK", os.environ["RANK"]) for flag in sys.argv[1:]]))
"""


@pytest.fixture
def broken(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to break."""
    return Path(shutil.copytree(corpus, tmp_path / "broken"))


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Undo what a run does to its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    reset_process()


def refusal(corpus: Path, run: Path, *flags: str) -> str:
    """Return the message of a run that must not start, and check that it left nothing behind."""
    existed = run.exists()
    with pytest.raises(InputError) as refused:
        main(["--data_dir", str(corpus), "--output_dir", str(run), *TINY, "--max_steps", "1", *flags])
    assert run.exists() == existed
    return str(refused.value)


def _first(corpus: Path, split: str = "train") -> Path:
    return sorted((corpus / split).glob("*.npz"))[0]


def _rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with np.load(path) as stored:
        features = stored["features"]
    np.savez(path, features=change(features))


def _with_nan(features: np.ndarray) -> np.ndarray:
    features[7, 3] = np.nan
    return features


@pytest.mark.parametrize("split", ["train", "dev"])
def test_nan_names_file_and_frame(broken: Path, tmp_path: Path, split: str) -> None:
    path = _first(broken, split)
    _rewrite(path, _with_nan)
    message = refusal(broken, tmp_path / "run")
    assert str(path) in message
    assert "frame 7" in message


def test_all_bad_files_are_reported_together(broken: Path, tmp_path: Path) -> None:
    first, second = sorted((broken / "train").glob("*.npz"))[:2]
    _rewrite(first, _with_nan)
    second.write_bytes(second.read_bytes()[:200])
    message = refusal(broken, tmp_path / "run")
    # The truncated one shows in its header already, before features are read.
    assert str(second) in message


def test_a_pickled_array_is_never_loaded(broken: Path, tmp_path: Path) -> None:
    path = _first(broken)
    np.savez(path, features=np.array([object()], dtype=object), allow_pickle=True)
    message = refusal(broken, tmp_path / "run")
    assert str(path) in message
    assert "pickled" in message


def test_wrong_rank_and_differing_dimension(broken: Path, tmp_path: Path) -> None:
    first, second = sorted((broken / "train").glob("*.npz"))[:2]
    _rewrite(first, lambda features: features[None])
    _rewrite(second, lambda features: features[:, :5])
    message = refusal(broken, tmp_path / "run")
    assert str(first) in message
    assert second.name in message
    assert "D = 5" in message


def test_missing_feature_files_are_counted_and_may_be_dropped_aloud(broken: Path, tmp_path: Path) -> None:
    gone = sorted((broken / "train").glob("*.npz"))[:12]
    for path in gone:
        path.unlink()
    message = refusal(broken, tmp_path / "run")
    assert "12 of 40" in message
    assert gone[0].stem in message
    assert gone[11].stem not in message
    done = train(1, broken, tmp_path / "run", "--allow_missing", "--max_steps", "1")
    assert "12 of 40" in done.stdout
    assert "28 training" in done.stdout


def test_a_missing_split_and_a_missing_corpus(broken: Path, tmp_path: Path) -> None:
    shutil.rmtree(broken / "dev")
    assert str(broken / "dev") in refusal(broken, tmp_path / "run")
    assert "--data_dir" in refusal(tmp_path / "nowhere", tmp_path / "run")


def test_annotation_problems_name_the_line(broken: Path, tmp_path: Path) -> None:
    path = broken / "annotations" / "train.corpus.csv"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].split("|")[0]
    lines[5] = lines[5].rsplit("|", 1)[0] + "|"
    lines[8] = lines[7]
    path.write_text("\n".join(lines) + "\n")
    message = refusal(broken, tmp_path / "run")
    for line in (4, 6, 9):
        assert f"{path}:{line}" in message


def test_streams_are_held_against_the_feature_dimension(corpus: Path, tmp_path: Path) -> None:
    message = refusal(corpus, tmp_path / "run", "--streams", "{pose: [0, 10], hands: [8, 40]}")
    assert "hands takes [8, 40) but the corpus has D = 32" in message
    assert "overlaps" in message


def test_a_run_directory_of_another_recipe_and_one_that_exists(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, corpus, run, "--max_steps", "1")
    assert "--resume auto" in refusal(corpus, run)
    message = refusal(corpus, run, "--resume", "auto", "--learning_rate", "0.5", "--seed", "9")
    assert "learning_rate" in message
    assert "seed" in message
    assert str(run / "recipe.yaml") in message


def test_a_vocabulary_that_changed_under_a_run(broken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--max_steps", "2", "--stop_after_steps", "1"]
    train(1, broken, run, *flags)
    path = broken / "annotations" / "train.corpus.csv"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].rsplit(" ", 1)[0] + " NEWGLOSS"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="NEWGLOSS"):
        main(["--data_dir", str(broken), "--output_dir", str(run), *TINY, *flags, "--resume", "auto"])


def test_training_clips_that_changed_under_a_run(broken: Path, tmp_path: Path) -> None:
    """The cursor counts clips of a plan; with other clips it would point to nothing, or to the wrong ones."""
    run = tmp_path / "run"
    flags = ["--max_steps", "4", "--stop_after_steps", "1"]
    train(1, broken, run, *flags)
    path = broken / "annotations" / "train.corpus.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    with pytest.raises(InputError, match=r"40 clips then, 40 now; ids, order, frames or glosses differ"):
        main(["--data_dir", str(broken), "--output_dir", str(run), *TINY, *flags, "--resume", "auto"])


def test_more_ranks_than_clips(corpus: Path, tmp_path: Path) -> None:
    done = train(3, corpus, tmp_path / "run", "--overfit_clips", "2", check=False)
    assert done.returncode != 0
    assert done.stderr.count("2 training clips for 3 ranks") == 1
    assert not (tmp_path / "run").exists()


def test_one_message_for_all_ranks(broken: Path, tmp_path: Path) -> None:
    path = _first(broken)
    _rewrite(path, _with_nan)
    done = train(2, broken, tmp_path / "run", check=False)
    assert done.returncode != 0
    assert done.stderr.count(str(path)) == 1
    assert "Traceback (most recent call last)" not in done.stderr.split("error:")[0]


def test_bad_content_in_train_and_dev_is_reported_together(broken: Path, tmp_path: Path) -> None:
    for split in ("train", "dev"):
        _rewrite(_first(broken, split), _with_nan)
    message = refusal(broken, tmp_path / "run")
    assert str(_first(broken, "train")) in message
    assert str(_first(broken, "dev")) in message


def test_what_one_rank_alone_finds_is_said_once_and_ends_all(corpus: Path, tmp_path: Path) -> None:
    """Ranks may see different copies of the corpus, each on its machine's disk."""
    (tmp_path / "rank0").symlink_to(corpus)
    (worker := tmp_path / "worker.py").write_text(OWN_CORPUS)
    flags = ["--data_dir", str(tmp_path / "rankRANK"), "--output_dir", str(tmp_path / "run"), *TINY, "--max_steps", "1"]
    done = launch(2, str(worker), flags, check=False)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {tmp_path / 'rank1'}") == 1
    assert not (tmp_path / "run").exists()


def test_copies_that_differ_in_their_times_alone_make_all_ranks_read_again(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "rank0").symlink_to(corpus)
    shutil.copytree(corpus, tmp_path / "rank1", copy_function=shutil.copyfile)
    (worker := tmp_path / "worker.py").write_text(OWN_CORPUS)
    flags = ["--data_dir", str(tmp_path / "rankRANK"), "--output_dir", str(tmp_path / "run"), *TINY, "--max_steps", "4"]
    for extra in (["--stop_after_steps", "1"], ["--resume", "auto"]):
        done = launch(2, str(worker), [*flags, *extra])
    assert "finished at step 4" in done.stdout


def test_accumulation_in_the_environment_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate would divide every gradient by it, in silence."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert "accumulation is the recipe's" in refusal(corpus, tmp_path / "run")


def test_evaluation_refuses_what_it_cannot_do_before_it_computes(corpus: Path, tmp_path: Path) -> None:
    train(1, corpus, tmp_path / "run", "--max_steps", "1")
    (tmp_path / "file").touch()
    for flags, message in (
        (["--output_dir", str(tmp_path / "file")], "choose another --output_dir"),
        (["--fps", "0"], "--fps"),
        (["--slpit", "dev"], "did you mean --split?"),
        (["--split", "holiday"], "holiday"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_main(["--checkpoint", str(tmp_path / "run"), *flags])


def test_exit_code_two_and_all_problems_at_once() -> None:
    done = launch(1, "trainer.train", ["--optimzer", "adam", "--epochs", "none", "--betas", "0.9", "1.5"], check=False)
    assert done.returncode == 2
    assert "did you mean --optimizer?" in done.stderr
    for name in ("epochs", "betas", "data_dir"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_clip_that_vanishes_during_training_ends_the_run_by_name(broken: Path, tmp_path: Path) -> None:
    """The rank that cannot read a clip says so; nobody hangs."""
    run = tmp_path / "run"
    flags = ["--max_steps", "4", "--stop_after_steps", "1", "--batch_size", "40", "--evaluate_every", "99"]
    train(1, broken, run, *flags)
    path = _first(broken)
    path.write_bytes(path.read_bytes()[:100])
    done = train(2, broken, run, *flags, "--resume", "auto", check=False)
    assert done.returncode != 0
    assert str(path) in done.stderr
