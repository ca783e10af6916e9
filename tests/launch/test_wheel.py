"""Installed from a wheel, in a folder without a checkout, everything that is shipped is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment
from trainer.shipped import SHIPPED, find_shipped

FOLDERS = ("accelerate_configs", "configs", "ds_configs")
PACKAGES = ("trainer", "launch")
SIZE = ("--nodes", "2", "--gpus_per_node", "2", "--profile", "example")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source") / "signscale"
    for name in (*FOLDERS, *PACKAGES):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source / name)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source.parent))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=300)
    (built,) = source.parent.glob("signscale-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """What pip makes of a wheel, without the packages it needs: they are those of this environment."""
    target = wheel.with_name("site-packages")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def say(installed: Path, empty: Path, *words: str) -> str:
    """Run a module of the installation in an empty folder and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=empty,
        env=environment() | {"PYTHONPATH": str(installed), "XDG_CONFIG_HOME": str(empty), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_holds_all_that_is_shipped(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    assert {name.removeprefix("trainer/_shipped/") for name in names if name.startswith("trainer/_shipped/")} == wanted
    assert "launch/slurm/job.sh.j2" in names
    # Names as general as these belong to no package of ours at the top.
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)


def test_commands_find_it_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    train = ("train", "--config", "configs/teacher_small.yaml", "--data_dir", "corpus", "--output_dir", "run")
    shipped = installed / "trainer" / "_shipped"
    said = say(installed, tmp_path, "launch.cli", "launch", "local", "--cpu", "--dry-run", "--", *train)
    assert f"{shipped}/accelerate_configs/debug_cpu.yaml" in said
    assert f"--config {shipped}/configs/teacher_small.yaml" in said
    zero = ("--accelerate_config", "deepspeed_zero2")
    said = say(installed, tmp_path, "launch.cli", "launch", "slurm", *SIZE, *zero, "--dry-run", "--", *train)
    assert " accelerate_configs/deepspeed_zero2.yaml\n" in said
    assert f"{shipped}/configs/clusters/example.yaml" in said
    assert "usage: signscale doctor" in say(installed, tmp_path, "launch.cli", "doctor", "--help")
    assert say(installed, tmp_path, "trainer.shipped") == f"{shipped}\n"
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_a_job_s_copy_of_an_installation_looks_like_a_checkout(installed: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    copy = tmp_path / "snapshot"
    script = "from pathlib import Path; from launch.jobs.snapshot import take_snapshot as t; t(Path('../snapshot'))"
    (tmp_path / "take.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "take.py")], cwd=empty, env=environment() | {"PYTHONPATH": str(installed)}
    )
    assert done.returncode == 0
    assert json.loads((copy / "snapshot.json").read_text())["root"] == str(installed)
    assert not (copy / "trainer" / "_shipped").exists()
    for name in ("accelerate_configs/multi_node.yaml", "ds_configs/zero2.json", "launch/slurm/job.sh.j2"):
        assert (copy / name).read_bytes() == (ROOT / name).read_bytes()
    assert say(copy, empty, "trainer.shipped") == f"{copy}\n"


def test_what_lies_in_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert SHIPPED == ROOT
    assert find_shipped("configs/demo.yaml") == ROOT / "configs" / "demo.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").touch()
    assert find_shipped("configs/demo.yaml") == Path("configs/demo.yaml")
    assert find_shipped("configs/none.yaml") == Path("configs/none.yaml")
