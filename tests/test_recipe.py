"""A recipe means what its user wrote: the nearer source wins, and whatever is wrong is said at once and by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import InputError
from trainer.parsing import dump_recipe, field_names, load_recipe, parse_recipe
from trainer.recipe import FREE_ON_RESUME, BatchRecipe, CorpusRecipe, OptimizationRecipe, Recipe, RunRecipe

ROOT = Path(__file__).parents[1]
# Pipelines lie beside the recipes; tests/pipeline reads those.
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("pipeline"))
FLAGS_RESEARCHERS_USE = [
    "model",
    "data_dir",
    "annotations",
    "output_dir",
    "batch_size",
    "gradient_accumulation_steps",
    "epochs",
    "max_steps",
    "learning_rate",
    "min_lr",
    "warmup_epochs",
    "scheduler",
    "optimizer",
    "weight_decay",
    "betas",
    "dropout",
    "gradient_clip",
    "label_smoothing",
    "mixup_alpha",
    "augment",
    "num_workers",
    "early_stopping_patience",
    "seed",
    "log_every",
    "resume",
    "init_from",
    "batch_scaling",
    "max_frames_per_microbatch",
    "shuffle_window",
    "loss_normalization",
    "allow_missing",
]


def parse(*flags: str) -> Recipe:
    return parse_recipe(["--data_dir", "corpus", *flags])


def problems_of(*flags: str) -> tuple[str, ...]:
    """Return what is wrong with these flags, beside a corpus that is right."""
    with pytest.raises(InputError) as caught:
        parse(*flags)
    return caught.value.problems


def the_problem_of(*flags: str) -> str:
    [problem] = problems_of(*flags)
    return problem


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# Precedence.


def test_flags_win_over_files_and_files_over_defaults(tmp_path: Path) -> None:
    config = write(tmp_path / "r.yaml", "batch_size: 4\nepochs: 60\n")
    recipe = parse("--epochs", "70", "--config", config)
    assert recipe.run.epochs == 70
    assert recipe.batch.batch_size == 4
    assert recipe.batch.gradient_accumulation_steps == BatchRecipe().gradient_accumulation_steps


def test_of_two_files_the_later_one_wins_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "batch_size: 4\nepochs: 60\n")
    second = write(tmp_path / "b.yaml", "epochs: 80\n")
    recipe = parse("--config", first, "--config", second)
    assert (recipe.batch.batch_size, recipe.run.epochs) == (4, 80)


def test_a_flag_given_twice_has_its_last_value() -> None:
    assert parse("--batch_size", "4", "--batch_size=6").batch.batch_size == 6


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "r.yaml", "# nothing yet\n")) == parse()


# What a value may look like.


@pytest.mark.parametrize(
    ("words", "betas"),
    [
        (["--betas", "0.9", "0.98"], (0.9, 0.98)),
        (["--betas", "[0.8, 0.99]"], (0.8, 0.99)),
        (["--betas=[0.8, 0.99]"], (0.8, 0.99)),
    ],
)
def test_betas_are_two_words_or_a_list(words: list[str], betas: tuple[float, float]) -> None:
    assert parse(*words).optimization.betas == betas


@pytest.mark.parametrize(
    ("words", "trackers"),
    [
        (["--trackers", "wandb"], ["wandb"]),
        (["--trackers", "wandb", "tensorboard"], ["wandb", "tensorboard"]),
        (["--trackers", "[wandb]"], ["wandb"]),
        (["--trackers", "[]"], []),
    ],
)
def test_trackers_are_one_word_or_several_or_none(words: list[str], trackers: list[str]) -> None:
    assert parse(*words).run.trackers == trackers


@pytest.mark.parametrize(
    ("words", "augment"),
    [
        (["--augment"], True),
        (["--augment", "true"], True),
        (["--augment=false"], False),
        (["--augment", "--seed", "1"], True),
        ([], False),
    ],
)
def test_a_switch_needs_no_value_but_takes_one(words: list[str], augment: bool) -> None:
    assert parse(*words).corpus.augment is augment


def test_streams_are_a_mapping_from_a_file_or_a_flag(tmp_path: Path) -> None:
    streams = {"pose": [0, 99], "hands": [99, 225, 300, 400]}
    config = write(tmp_path / "r.yaml", yaml.safe_dump({"streams": streams}))
    assert parse("--config", config).model.streams == streams
    assert parse("--streams", "{pose: [0, 99], hands: [99, 225, 300, 400]}").model.streams == streams
    assert parse("--config", config, "--streams", "null").model.streams is None


def test_scientific_notation_is_a_number_in_files_and_flags(tmp_path: Path) -> None:
    # YAML 1.1 reads 3e-4 as a word, and papers write it without a dot.
    config = write(tmp_path / "r.yaml", "learning_rate: 3e-4\nmin_lr: 1e-7\n")
    assert parse("--config", config, "--min_lr", "2e-7").optimization.min_lr == 2e-7
    assert parse("--config", config).optimization.learning_rate == 3e-4


def test_numbers_are_pythons_own() -> None:
    recipe = parse("--batch_size", "4", "--learning_rate", "1e-3", "--dropout", "0.1")
    assert type(recipe.batch.batch_size) is int
    assert type(recipe.optimization.learning_rate) is float
    assert type(recipe.model.dropout) is float


# What is refused, and how.


def test_all_problems_arrive_at_once_each_with_its_origin(tmp_path: Path) -> None:
    config = write(tmp_path / "mine.yaml", "bach_size: 4\ndropout: much\nmodel: oracle\n")
    problems = problems_of(
        "--config", config, "--epoch", "3", "--seed", "x", "--label_smoothing", "1", "--betas", "0.9", "1.5"
    )
    expected = [
        (config, "unknown key 'bach_size'", "did you mean batch_size?"),
        (config, "dropout", "much"),
        (config, "model", "oracle"),
        ("command line", "unknown flag --epoch", "did you mean --epochs?"),
        ("command line", "seed", "'x'"),
        ("label_smoothing", "below 1"),
        ("betas", "1.5"),
    ]
    assert len(problems) == len(expected)
    for parts in expected:
        assert sum(all(part in problem for part in parts) for problem in problems) == 1, (parts, problems)


def test_a_key_like_no_other_is_sent_to_the_help() -> None:
    assert "--help" in the_problem_of("--frobnicate", "1")


def test_a_value_without_a_flag_is_refused() -> None:
    with pytest.raises(InputError, match="'corpus' belongs to no flag"):
        parse_recipe(["corpus"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", "0"),
        ("batch_size", "2.5"),
        ("batch_size", "[4]"),
        ("gradient_accumulation_steps", "-1"),
        ("epochs", "many"),
        ("seed", "-1"),
        ("learning_rate", "0"),
        ("learning_rate", "-1e-3"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("min_lr", "-1e-6"),
        ("min_lr", "nan"),
        ("min_lr", "inf"),
        ("weight_decay", "inf"),
        ("gradient_clip", "nan"),
        ("warmup_epochs", "inf"),
        ("width", "inf"),
        ("mixup_alpha", "inf"),
        ("augment_noise", "inf"),
        ("dropout", "1.5"),
        ("dropout", "1"),
        ("dropout", "nan"),
        ("label_smoothing", "1"),
        ("augment_rescale", "1"),
        ("augment_frame_drop", "1"),
        ("target_wer", "nan"),
        ("target_wer", "inf"),
        ("target_wer", "-1"),
        ("total_stride", "8"),
        ("scheduler", "cosinus"),
        ("optimizer", "lion"),
        ("loss_normalization", "mean"),
        ("augment", "maybe"),
        ("betas", "0.9"),
        ("betas", "[0.9, 0.99, 0.999]"),
        ("betas", "[0.9, 1.0]"),
        ("betas", "[nan, 0.9]"),
        ("trackers", "mlflow"),
        ("streams", "[0, 99]"),
        ("streams", "{pose: 99}"),
        ("streams", "{pose: [0]}"),
        ("streams", "{pose: []}"),
        ("streams", "{pose: [99, 0]}"),
        ("streams", "{pose: [-3, 5]}"),
        ("annotations", "ann/{part}.csv"),
        ("frame_size", "0"),
        ("crop_size", "-1"),
        ("augment_color", "1.5"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_by_its_key(tmp_path: Path, key: str, value: str) -> None:
    assert all(key in problem for problem in problems_of(f"--{key}", value))
    # YAML spells what is not finite with a dot.
    spelled = {"nan": ".nan", "inf": ".inf"}.get(value, value.replace("[nan", "[.nan"))
    config = write(tmp_path / "r.yaml", f"{key}: {spelled}\n")
    assert all(key in problem for problem in problems_of("--config", config))


@pytest.mark.parametrize("key", ["batch_size", "dropout", "augment", "model", "betas", "output_dir", "resume"])
def test_a_key_left_empty_in_a_file_is_refused(tmp_path: Path, key: str) -> None:
    assert key in the_problem_of("--config", write(tmp_path / "r.yaml", f"{key}:\n"))


@pytest.mark.parametrize("key", ["output_dir", "resume", "init_from", "wandb_project", "config"])
def test_a_flag_of_a_text_needs_its_text(key: str) -> None:
    # Otherwise `--resume --seed 1` would look for a checkpoint called "true".
    assert key in the_problem_of(f"--{key}", "--seed", "1")


def test_a_seed_beyond_what_the_generators_take_is_refused() -> None:
    assert "seed" in the_problem_of("--seed", str(2**64))


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--learning_rate", "1e-4", "--min_lr", "1e-3"], "min_lr"),
        (["--epochs", "3", "--warmup_epochs", "3"], "warmup_epochs"),
        (["--resume", "runs/a", "--init_from", "runs/b"], "resume and init_from"),
        (["--data_dir="], "data_dir"),
        (["--crop_size", "300"], "crop_size"),
        (["--model", "i3d", "--mixup_alpha", "0.4"], "mixup_alpha"),
    ],
)
def test_an_impossible_combination_is_refused_by_its_key(flags: list[str], key: str) -> None:
    assert the_problem_of(*flags).startswith(f"{key}: ")


def test_resuming_automatically_may_name_the_weights_it_began_from() -> None:
    assert parse("--resume", "auto", "--init_from", "runs/b").run.init_from == "runs/b"


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning_rate", "fast", "--min_lr", "1e-3"],
        ["--epochs", "many", "--warmup_epochs", "200"],
    ],
)
def test_a_combination_is_not_judged_on_the_default_of_a_bad_value(flags: list[str]) -> None:
    assert flags[0].removeprefix("--") in the_problem_of(*flags)


@pytest.mark.parametrize("text", ["- a\n- b\n", "batch_size: [1\n", "just words"])
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str) -> None:
    config = write(tmp_path / "r.yaml", text)
    assert the_problem_of("--config", config).startswith(f"{config}: ")


def test_a_file_that_is_missing_or_binary_is_refused_by_name(tmp_path: Path) -> None:
    binary = tmp_path / "r.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere.yaml", binary):
        assert the_problem_of("--config", str(path)).startswith(f"{path}: ")


# Out and in again.


def test_the_printed_recipe_is_a_file_that_gives_the_same_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--betas", "0.9", "0.98", "--streams", "{pose: [0, 3]}", "--min_lr", "1e-9", "--trackers", "wandb"]
    with pytest.raises(SystemExit) as left:
        parse(*flags, "--print_config")
    assert left.value.code == 0
    printed = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert parse_recipe(["--config", printed]) == parse(*flags)


def test_the_printed_recipe_names_every_field_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert list(printed) == field_names()
    assert len(set(field_names())) == len(field_names())


def test_a_recipe_with_problems_is_not_printed() -> None:
    assert "--batch_size" in the_problem_of("--print_config", "--batchsize", "4")


_paths = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=20)


@settings(max_examples=15, deadline=None)
@given(
    data_dir=_paths,
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    decay=st.floats(min_value=0, allow_infinity=False),
    betas=st.tuples(*[st.floats(min_value=0, max_value=1, exclude_max=True)] * 2),
    streams=st.none() | st.dictionaries(st.from_regex("[a-z_]{1,9}", fullmatch=True), st.just([0, 3]), min_size=1),
    seed=st.integers(min_value=0, max_value=2**64 - 1),
    augment=st.booleans(),
    target_wer=st.none() | st.floats(min_value=0, max_value=1000),
)
def test_what_is_dumped_is_loaded_again_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory,
    data_dir: str,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    streams: dict[str, list[int]] | None,
    seed: int,
    augment: bool,
    target_wer: float | None,
) -> None:
    values = {
        "data_dir": data_dir,
        "learning_rate": rate,
        "weight_decay": decay,
        "betas": betas,
        "streams": streams,
        "seed": seed,
        "augment": augment,
        "target_wer": target_wer,
    }
    recipe = Recipe.from_flat(values)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


# What is shipped.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_to_what_it_says(path: Path) -> None:
    parsed = parse("--config", str(path)).flat()
    for key, value in yaml.safe_load(path.read_text()).items():
        # The corpus is named on the command line here; "3e-4" is a word to YAML 1.1; a list may become a tuple.
        if key != "data_dir":
            assert parsed[key] == (type(parsed[key])(value) if isinstance(parsed[key], float | tuple) else value), key


_TEACHERS = {
    "teacher_conservative": (8, 2, 150, 5, 3e-4, "adamw", 1e-4, 0.3, 1.0, 0.0, 0.0, "cosine"),
    "teacher_aggressive": (12, 1, 100, 3, 5e-4, "adam", 1e-4, 0.25, 0.5, 0.0, 0.0, "cosine"),
    "teacher_regularized": (8, 2, 200, 10, 2e-4, "adamw", 1e-3, 0.4, 1.0, 0.1, 0.2, "cosine_with_restarts"),
}


@pytest.mark.parametrize("name", _TEACHERS)
def test_the_three_teacher_recipes_are_the_agreed_ones(name: str) -> None:
    recipe = parse("--config", str(ROOT / "configs" / f"{name}.yaml"))
    opt = recipe.optimization
    assert (
        recipe.batch.batch_size,
        recipe.batch.gradient_accumulation_steps,
        recipe.run.epochs,
        opt.warmup_epochs,
        opt.learning_rate,
        opt.optimizer,
        opt.weight_decay,
        recipe.model.dropout,
        opt.gradient_clip,
        recipe.objective.label_smoothing,
        recipe.objective.mixup_alpha,
        opt.scheduler,
    ) == _TEACHERS[name]
    assert (opt.min_lr, opt.betas, recipe.corpus.augment) == (1e-6, (0.9, 0.999), True)


def test_the_helper_recipes_are_shipped_and_do_what_they_are_called() -> None:
    assert {"overfit", "finetune", "demo", *_TEACHERS} <= {path.stem for path in SHIPPED}
    overfit = parse("--config", str(ROOT / "configs" / "overfit.yaml"))
    assert (overfit.corpus.overfit_clips, overfit.run.target_wer) == (5, 0.0)
    assert not overfit.corpus.augment
    assert overfit.model.dropout == overfit.optimization.weight_decay == overfit.objective.label_smoothing == 0
    finetune = parse("--config", str(ROOT / "configs" / "finetune.yaml"))
    assert (finetune.optimization.learning_rate, finetune.run.epochs) == (5e-5, 50)


# Help.


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_recipe(["--help"])
    assert left.value.code == 0
    entries = capsys.readouterr().out.split("\n  --")
    explained = {}
    for entry in entries:
        lines = entry.splitlines()
        # A flag is `--name VALUE` and then its line, or lines, of help.
        text = " ".join(line.strip() for line in lines[1:]) or lines[0].partition("   ")[2]
        explained[lines[0].split()[0]] = text
    for name in field_names():
        assert name in explained, name
        assert len(explained[name].replace("(type:", " (type:").split("(type:")[0].strip()) > 5, name


def test_the_flags_keep_the_names_that_researchers_use() -> None:
    assert set(FLAGS_RESEARCHERS_USE) <= set(field_names())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "usage: signscale"),
        (["train", "--help"], "--batch_size"),
        (["train", "--data_dir", "d", "--print_config"], "data_dir: d"),
    ],
)
def test_questions_are_answered_without_torch(words: list[str], said: str) -> None:
    code = (
        "import sys, trainer.parsing\n"
        "from launch.cli import run\n"
        "try:\n"
        f"    run({words!r})\n"
        "except SystemExit as left:\n"
        "    assert left.code == 0\n"
        "print('torch' in sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert said in answer.stdout
    assert answer.stdout.splitlines()[-1] == "False"


def test_a_mistake_ends_in_exit_code_2_with_the_nearest_name_and_no_traceback() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "--batchsize", "4", "--print_config"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert answer.returncode == 2
    assert "did you mean --batch_size?" in answer.stderr
    assert "Traceback" not in answer.stderr


# What the recipe says of the hardware.


def test_the_global_batch_and_the_rate_know_nothing_of_the_hardware() -> None:
    recipe = Recipe(batch=BatchRecipe(batch_size=8, gradient_accumulation_steps=2))
    assert {recipe.global_batch_size(world_size) for world_size in (1, 2, 8, 512)} == {16}
    assert {recipe.peak_learning_rate(world_size) for world_size in (1, 2, 8, 512)} == {3e-4}


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_linear_batch_scaling_multiplies_the_batch_and_the_rate_by_a_named_rule(rule: str, factor: float) -> None:
    recipe = parse("--batch_scaling", "linear", "--learning_rate_rule", rule, "--learning_rate", "1e-3")
    assert recipe.global_batch_size(4) == 64
    assert recipe.peak_learning_rate(4) == pytest.approx(1e-3 * factor)
    assert recipe.peak_learning_rate(1) == 1e-3


def test_flat_and_tree_are_two_forms_of_one_recipe() -> None:
    recipe = Recipe(
        corpus=CorpusRecipe(data_dir="d"), optimization=OptimizationRecipe(betas=(0.8, 0.9)), run=RunRecipe(seed=7)
    )
    assert Recipe.from_flat(recipe.flat()) == recipe
    assert set(recipe.flat()) == set(field_names())
    assert set(field_names()) >= FREE_ON_RESUME
