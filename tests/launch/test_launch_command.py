"""`signscale launch`: one plan, printed, checked before anything is written or started."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.jobs.place import understand
from launch.jobs.plan import Plan
from launch.launch import main
from launch.prepare import RECIPE
from tests.conftest import ROOT, TINY, environment
from trainer.errors import InputError
from trainer.job.directory import AttemptRecord, JobDirectory
from trainer.parsing import dump_recipe, load_recipe, parse_recipe

TRAIN = ["train", "--data_dir", "corpus", *TINY, "--max_steps", "4"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def plan_printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Read the printed table."""
    table = capsys.readouterr().out.split("\n\n")[0]
    return {line[2:].split("  ")[0]: line[2:].split("  ", 1)[1].strip() for line in table.splitlines()}


def mistake(*words: str) -> str:
    with pytest.raises(InputError) as raised:
        main(words)
    return "\n".join(raised.value.problems)


@pytest.mark.parametrize("way", ["debug", "local", "slurm"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = ["--cpu", "--processes", "2"] if way == "local" else []
    assert main([way, "--dry-run", *cpu, "--", *TRAIN, "--output_dir", "runs/a"]) == 0
    shown = plan_printed(capsys)
    run = tmp_path / "runs" / ("a-debug" if way == "debug" else "a")
    assert (shown["way"], shown["run"]) == (way, str(run))
    assert f"--data_dir {tmp_path}/corpus" in shown["command"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_a_cluster_prints_the_whole_script(capsys: pytest.CaptureFixture[str]) -> None:
    main(["slurm", "--dry-run", "--nodes", "2", "--", *TRAIN, "--output_dir", "runs/a"])
    said = capsys.readouterr()
    assert "#!/bin/bash\n" in said.out
    assert said.out.rstrip().endswith('-m launch.slurm.agent --job "$job"')
    assert "is not there on this machine; the job needs it on the nodes" in said.err


def test_help_comes_without_torch_in_less_than_a_second() -> None:
    for words in (["launch"], ["launch", "--help"], ["launch", "slurm", "--help"]):
        code = f"import sys; from launch.cli import run\ntry:\n run({words})\nfinally:\n print('torch' in sys.modules)"
        said = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True).stdout
        assert "usage: signscale launch" in said
        assert said.endswith("False\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cloud"], "unknown way 'cloud'; expected one of debug, local, slurm"),
        (["local"], "nothing to launch"),
        (["local", "--", "pack"], "'pack' is not launched; expected one of train, extract, evaluate"),
        (["local", "--", "-m"], "name the module"),
        (["local", "--", "-m", "x"], "say with --run FOLDER"),
        (["local", "--run", "a", "--", *TRAIN], "--run goes with -m MODULE alone"),
        (["local", "--", *TRAIN, "--learnin_rate", "1"], "did you mean --learning_rate?"),
        (["slurm", "--", *TRAIN, "--epochs", "0"], "epochs"),
        (["slurm", "--", "evaluate", "--checkpoint", "x", "--splt", "dev"], "did you mean --split?"),
        (["slurm", "--", "extract", "--checkpoint", "x", "--top_k", "-1"], "expected 0 or more"),
        (["local", "--cpu", "--accelerate_config", "many", "--", *TRAIN], "or one of debug_cpu, deepspeed_zero1"),
    ],
)
def test_a_mistake_costs_nothing(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in mistake(*words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file: is a file" in mistake("slurm", "--", *TRAIN, "--output_dir", "file/run")


def test_what_a_command_writes_to_decides_where_its_job_is_kept(tmp_path: Path) -> None:
    for words, run in (
        ([*TRAIN, "--output_dir", "r"], "r"),
        (["evaluate", "--checkpoint", "r", "--split", "dev"], "r/evaluation-job-dev"),
        (["evaluate", "--checkpoint", "r/checkpoints/best"], "r/evaluation-job-test"),
        (["extract", "--checkpoint", "r"], "r/soft_targets/train"),
        (["extract", "--checkpoint", "r", "--output", "out"], "out"),
    ):
        assert understand(words).run == tmp_path / run
    assert understand(["-m", "any", "x"], run=Path("r")).run == tmp_path / "r"


def test_every_path_means_the_same_in_any_folder(tmp_path: Path) -> None:
    """Options that name paths are known to the launcher; the others stay as they are."""
    command = understand([*TRAIN, "--output_dir=r", "--init_from", "b.pt", "--cache_dir", "/c", "--annotations", "a"])
    assert command.recipe is not None
    assert [command.recipe[key] for key in ("data_dir", "output_dir", "init_from", "cache_dir", "annotations")] == [
        *(f"{tmp_path}/{name}" for name in ("corpus", "r", "b.pt")),
        "/c",
        f"{tmp_path}/a",
    ]
    assert f"--output_dir={tmp_path}/r" in command.words
    assert understand(["train", "--data_dir", "s3://bucket/x"]).recipe["data_dir"] == "s3://bucket/x"  # type: ignore[index]
    words = understand(
        ["evaluate", "--checkpoint", "r", "--lm=x.arpa", "--output_dir", "o", "--protocol", "plain"]
    ).words
    assert words == (
        *("evaluate", "--checkpoint", f"{tmp_path}/r", f"--lm={tmp_path}/x.arpa"),
        *("--output_dir", f"{tmp_path}/o", "--protocol", "plain"),
    )


def test_options_that_are_paths_are_all_known() -> None:
    """A new option of type Path has to be made absolute too."""
    from launch.jobs import place

    for name, known in place._OPTION_PATHS.items():
        source = (ROOT / "trainer" / f"{name}.py").read_text() + (
            ROOT / "trainer" / "scoring" / "decoder.py"
        ).read_text()
        named = {
            line.split('"--')[1].split('"')[0] for line in source.splitlines() if "type=Path" in line and '"--' in line
        }
        assert named - {"lm"} <= set(known), name


def test_launching_the_same_recipe_again_goes_on_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.jobs.options import parse_options
    from launch.prepare import prepare, write

    words = [*TRAIN, "--output_dir", "r"]
    first = write(prepare("slurm", parse_options("slurm", []), words))
    assert first.recipe is not None
    assert first.recipe["resume"] == ""
    # As the ranks leave it.
    stored = parse_recipe(["--config", str(first.job.folder / RECIPE)])
    (tmp_path / "r" / "recipe.yaml").write_text(dump_recipe(stored))
    again = write(prepare("slurm", parse_options("slurm", []), words))
    assert again.recipe is not None
    assert again.recipe["resume"] == "auto"
    assert load_recipe(again.job.folder / RECIPE).run.resume == "auto"
    assert again.arguments == ("--config", str(tmp_path / "r" / "job" / RECIPE))
    assert "learning_rate is 0.0003 there and 0.1 now" in mistake("slurm", "--", *words, "--learning_rate", "0.1")


def test_a_run_that_is_worked_on_is_refused(tmp_path: Path) -> None:
    job = JobDirectory.of(tmp_path / "r")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        attempt = f"local-1-{other.pid}"
        job.begin(AttemptRecord(attempt=attempt, began=time.time(), host=platform.node(), pid=other.pid))
        said = mistake("local", "--cpu", "--", *TRAIN, "--output_dir", "r")
        assert f"signscale status {tmp_path}/r" in said
        assert "signscale cancel" in said
        other.communicate(b"\n")
    # Gone without a word: nobody works on it any more.
    assert main(["local", "--cpu", "--dry-run", "--", *TRAIN, "--output_dir", "r"]) == 0


def test_a_damaged_plan_does_not_stop_a_new_launch(tmp_path: Path) -> None:
    folder = tmp_path / "r" / "job"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{")
    with pytest.raises(InputError, match="is no plan of a job"):
        Plan.load(folder / "plan.json")
    assert main(["local", "--cpu", "--dry-run", "--", *TRAIN, "--output_dir", "r"]) == 0


def test_where_there_is_no_cluster_one_message_names_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(Path(folder, "slurm.conf").exists() for folder in ("/etc/slurm", "/etc/slurm-llnl")):
        pytest.skip("this machine belongs to a cluster")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    without = tmp_path / "empty"
    without.mkdir()
    for path in (str(without), os.environ["PATH"]):
        monkeypatch.setenv("PATH", path)
        said = mistake("slurm", "--", *TRAIN, "--output_dir", "r")
        assert "signscale launch local" in said
        assert "login node" in said
        assert not (tmp_path / "r").exists()
