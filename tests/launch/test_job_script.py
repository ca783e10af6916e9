"""The batch script: what a user typed stays a value, whatever it holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.jobs.options import parse_options
from launch.jobs.plan import Plan, Task
from launch.prepare import prepare, write
from launch.slurm.script import render
from trainer.errors import InputError

HOSTILE = """it's "$(touch CANARY)" `touch CANARY`; touch CANARY #\\ $HOME 100% ä"""


def plan_of(run: Path, *options: str, command: Sequence[str] = ("x",), tasks: list[Task] | None = None) -> Plan:
    """Plan a batch job of a module."""
    parsed = parse_options("slurm", ["--run", str(run), "--launcher", "plain", *options])
    return prepare("slurm", parsed, ["-m", "tests.stub", *command], tasks=tasks)


VARIANTS = {
    "plain": [],
    "gpus": [
        "--nodes",
        "4",
        "--gpus_per_node",
        "a100:4",
        "--mem_per_gpu",
        "80G",
        "--time",
        "2-00:00:00",
        "--exclusive",
    ],
    "site": ["--modules", "gcc/12", "--modules", HOSTILE, "--setup", "export A=1", "--partition", "a,b", "--nice", "5"],
    "venv": [
        "--venv",
        f"/opt/{HOSTILE}",
        "--constraint",
        "a100&nvlink|h100",
        "--exclude",
        "node[3,7-9]",
        "--preflight",
    ],
    "conda": ["--conda", HOSTILE, "--no_requeue", "--export", "NONE", "--comment", HOSTILE, "--mail_user", HOSTILE],
    "apptainer": ["--container", f"/img/{HOSTILE}.sif", "--container_mounts", f"/a{HOSTILE}", "--preflight"],
    "pyxis": ["--container", "nvcr.io#nvidia/pytorch:24.01", "--container_mounts", "/data:/data:ro", "--preflight"],
    "extra": ["--sbatch", f"wckey={HOSTILE}", "--sbatch=--gres-flags=enforce-binding", "--sbatch", "overcommit"],
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_script_is_one_that_shells_and_their_critics_accept(tmp_path: Path, options: list[str]) -> None:
    script = tmp_path / "job.sh"
    script.write_text(render(plan_of(tmp_path / "run", "--name", HOSTILE, *options)))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        if os.environ.get("CLUSTER_TESTS") == "required":
            pytest.fail("CLUSTER_TESTS=required, but shellcheck is not installed")
        pytest.skip("bash accepts the script; shellcheck, which is not installed, was not asked")
    found = subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_script_runs_with_every_value_as_it_was_typed(tmp_path: Path) -> None:
    """The whole script is executed, with an interpreter that writes down what it was given."""
    work = tmp_path / HOSTILE.replace("\\", "_")
    work.mkdir()
    interpreter = work / "python $(touch CANARY)"
    interpreter.write_text('#!/bin/bash\nprintf "%s\\0" "$PWD" "$PYTHONPATH" "$@" >"$SEEN"\n')
    interpreter.chmod(0o755)
    (tmp_path / "bin").mkdir()
    for tool in ("module", "scontrol"):
        (tmp_path / "bin" / tool).write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>"$SEEN.{tool}"\n')
        (tmp_path / "bin" / tool).chmod(0o755)
    options = ["--interpreter", str(interpreter), "--modules", HOSTILE, "--modules", "gcc/12", "--name", HOSTILE]
    plan = write(plan_of(work / "run", *options, command=[HOSTILE]))
    seen = tmp_path / "seen"
    outcome = subprocess.run(
        ["bash", plan.job.script],
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SEEN": str(seen)}
        | {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": "2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    folder, path, *words = seen.read_text().split("\0")[:-1]
    job = str(plan.job.folder)
    assert folder == path == str(plan.snapshot)
    assert words[:5] == ["-m", "launch.slurm.director", "--job", job, "--"]
    at = words.index("signscale")
    assert words[at : at + 5] == ["signscale", job, "180", str(interpreter), "7.2"]
    assert words[-5:] == [str(interpreter), "-m", "launch.slurm.agent", "--job", job]
    assert (tmp_path / "seen.module").read_text().splitlines() == ["load", HOSTILE, "load", "gcc/12"]
    assert Plan.load(plan.job.plan).arguments == (HOSTILE,)
    assert not list(tmp_path.rglob("CANARY"))


def test_a_node_without_the_interpreter_is_named_and_fails_the_job(tmp_path: Path) -> None:
    plan = write(plan_of(tmp_path / 'a "run"', "--interpreter", '/nowhere/"my" \\ python'))
    outcome = subprocess.run(
        ["bash", plan.job.script], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"}, capture_output=True, text=True
    )
    assert outcome.returncode == 1
    word = plan.job.last_word()
    assert word is not None
    assert (word.word, word.attempt) == ("FAILED", "7.0")
    assert word.reason in outcome.stderr
    assert 'has no /nowhere/"my" \\ python; check --interpreter' in word.reason


def test_no_value_of_the_environment_stands_in_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-0f-mine")
    plan = write(plan_of(tmp_path / "run", "--export", "PATH,HOME,WANDB_API_KEY"))
    files = [path for path in plan.job.folder.rglob("*") if path.is_file()]
    assert "WANDB_API_KEY" in plan.job.script.read_text()
    # This file names the value itself, and is part of the copy of the code.
    guilty = [path for path in files if b"s3cr3t-0f-mine" in path.read_bytes() and path.name != Path(__file__).name]
    assert not guilty


def test_options_become_the_lines_that_sbatch_reads(tmp_path: Path) -> None:
    options = [
        "--nodes",
        "2",
        "--gpus_per_node",
        "4",
        "--cpus_per_task",
        "6",
        "--time",
        "90",
        "--signal_seconds",
        "120",
    ]
    lines = render(plan_of(tmp_path / "r%n", *options, "--no_requeue")).splitlines()
    for line in (
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=24",
        "gpus-per-node=4",
        "time=90",
        "signal=B:USR2@120",
        "no-requeue",
        "open-mode=append",
        "export=ALL",
        f"output={tmp_path}/r%%n/job/logs/slurm-%j.out",
    ):
        assert f"#SBATCH --{line}" in lines or f'#SBATCH --{line.replace("=", "=" + chr(34), 1)}"' in lines, line
    launch = next(line for line in lines if line.startswith("    srun "))
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in launch
    assert any("--kill-on-bad-exit=1 --wait=60" in line for line in lines)


def test_paths_mean_the_same_in_the_copy_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "p.yaml").write_text("interpreter: ~/envs/bin/python\ncontainer_mounts: [data, '../x:/x:ro']\n")
    home, here = tmp_path / "home", tmp_path
    for container, expected in (
        ("images/a.sif", f"{here}/images/a.sif"),
        ("~/a.sqsh", f"{home}/a.sqsh"),
        ("sandbox", f"{here}/sandbox"),
        ("nvcr.io#nvidia/pytorch:24.01", "nvcr.io#nvidia/pytorch:24.01"),
        ("docker://python:3.12", "docker://python:3.12"),
        ("ubuntu:22.04", "ubuntu:22.04"),
    ):
        words = ["--profile", "p.yaml", "--container", container, "--container_mounts", "~/out", "--conda", "./env"]
        plan = plan_of(tmp_path / "run", *words)
        assert plan.slurm is not None
        assert plan.slurm["container"] == expected
        assert tuple(plan.slurm["container_mounts"]) == (f"{here}/data", f"{here}/../x:/x:ro", f"{home}/out")
        assert plan.interpreter == f"{home}/envs/bin/python"
        assert plan.slurm["conda"] == f"{here}/env"
        assert f"{home}/out:{home}/out" in render(plan)
    assert plan_of(tmp_path / "run", "--interpreter", "bin/python").interpreter == f"{here}/bin/python"
    assert plan_of(tmp_path / "run", "--interpreter", "bash").interpreter == shutil.which("bash")
    assert plan_of(tmp_path / "run", "--venv", "v").interpreter == f"{here}/v/bin/python"


def test_a_sweep_becomes_an_array_with_a_log_per_task(tmp_path: Path) -> None:
    tasks = [Task(run=tmp_path / "sweep" / str(number), overrides={"seed": number}) for number in range(3)]
    text = render(plan_of(tmp_path / "sweep", tasks=tasks))
    assert "#SBATCH --array=0-2\n" in text
    assert "slurm-%A_%a.out" in text
    assert "#SBATCH --array=0-2%1\n" in render(plan_of(tmp_path / "sweep", "--array", "0-2%1", tasks=tasks))
    with pytest.raises(InputError, match="would write into one run; use --sweep"):
        plan_of(tmp_path / "run", "--array", "0-2")


@pytest.mark.parametrize("option", ["--name", "--partition", "--comment", "--modules", "--setup", "--sbatch"])
def test_a_line_break_in_a_value_is_refused(tmp_path: Path, option: str) -> None:
    value = "wckey=a\n#SBATCH --uid=0" if option == "--sbatch" else "a\ntouch CANARY"
    with pytest.raises(InputError, match="holds a line break"):
        plan_of(tmp_path / "run", option, value)
    with pytest.raises(InputError, match="holds a line break"):
        plan_of(tmp_path / "a\nb")


def test_what_a_plan_says_survives_its_file(tmp_path: Path) -> None:
    tasks = [Task(run=tmp_path / "0", overrides={"seed": 1, "betas": [0.9, 0.95], "name": "a b"})]
    plan = plan_of(tmp_path / "run", "--modules", "a", "--gpus_per_node", "h100:8", tasks=tasks)
    plan.save()
    assert json.loads(plan.job.plan.read_text())["version"] == 1
    again = Plan.load(plan.job.plan)
    assert render(again) == render(plan)
    assert again.arguments_of(0) == ("x", "--seed", "1", "--betas", "[0.9, 0.95]", "--name", "a b")
    assert again.job_of(0).folder == tmp_path / "0" / "job"
