"""The copy of the code that a batch job takes along."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.jobs import snapshot
from launch.jobs.options import parse_options
from launch.jobs.snapshot import describe_code, list_files, list_keys, take_snapshot
from launch.prepare import prepare, write
from tests.conftest import environment
from trainer.errors import InputError


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a file of every kind."""
    root = tmp_path / "a repo"
    for name in ("trainer/__init__.py", "trainer/deleted.py", "launch/__init__.py", "trainer/ü n.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / ".gitignore").write_text("/runs/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "trainer" / "__init__.py").write_text("# changed\n")
    (root / "trainer" / "deleted.py").unlink()
    (root / "trainer" / "new.py").write_text("# new\n")
    (root / "runs").mkdir()
    (root / "runs" / "weights").write_bytes(b"0" * 1000)
    (root / "trainer" / "run.sh").write_text("#!/bin/sh\n")
    (root / "trainer" / "run.sh").chmod(0o755)
    (root / "inner").symlink_to("trainer/new.py")
    (root / "outer").symlink_to(tmp_path)
    return root


def test_a_snapshot_is_the_code_as_it_is_now(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "run" / "job" / "snapshot"
    code = take_snapshot(target, repository)
    assert (code.commit, code.changed) == (git(repository, "rev-parse", "HEAD").strip(), True)
    assert (target / "trainer" / "__init__.py").read_text() == "# changed\n"
    assert (target / "trainer" / "new.py").exists()
    assert (target / "trainer" / "ü n.py").exists()
    assert (target / "trainer" / "run.sh").stat().st_mode & 0o111
    assert (target / "inner").read_text() == "# new\n"
    assert (target / "outer").resolve() == tmp_path.resolve()
    assert not (target / "trainer" / "deleted.py").exists()
    assert not (target / "runs").exists()
    difference = (target / "diff.patch").read_text()
    assert "+# changed" in difference
    assert "deleted file" in difference
    assert json.loads((target / "snapshot.json").read_text())["commit"] == code.commit


def test_keys_stay_at_home(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies beside the code untracked and by its name holds a key, is left out, and said."""
    keys = (".env", ".env.local", "launch/site.KEY", "tls.pem", ".netrc", "credentials.json", ".aws/config")
    for name in (*keys, "trainer/keys.py", "monkey.txt", "tracked.pem"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("s3cr3t")
    git(repository, "add", "tracked.pem")
    assert [str(path) for path in list_keys(repository)] == sorted(keys)
    take_snapshot(tmp_path / "snapshot", repository)
    for name in keys:
        assert not (tmp_path / "snapshot" / name).exists()
    for name in ("trainer/keys.py", "monkey.txt", "tracked.pem"):
        assert (tmp_path / "snapshot" / name).exists()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    copied = functools.partial(take_snapshot, root=repository)
    monkeypatch.setattr("launch.prepare.take_snapshot", copied)
    monkeypatch.setattr("launch.prepare.list_keys", lambda: list_keys(repository))
    plan = prepare("slurm", parse_options("slurm", ["--run", str(tmp_path / "run")]), ["-m", "any"])
    for _ in range(2):
        write(plan)
    [line] = capsys.readouterr().err.splitlines()
    assert "not in the job's copy of the code: .aws/config, .env, .env.local" in line
    assert [path.name for path in (tmp_path / "run").rglob("*.pem")] == ["tracked.pem"]


def test_the_difference_is_kept_byte_by_byte(repository: Path, tmp_path: Path) -> None:
    """Changes of a file in another encoding and with other ends of lines, in a repository that likes colours."""
    file = repository / "trainer" / "latin.py"
    file.write_bytes(b"a = 1\r\nb = 2\r\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")
    git(repository, "config", "color.diff", "always")
    changed = "a = 1\r\nb = 'ä'\r\n".encode("latin-1")
    file.write_bytes(changed)
    take_snapshot(tmp_path / "snapshot", repository)
    git(repository, "checkout", "--", str(file))
    git(repository, "apply", str(tmp_path / "snapshot" / "diff.patch"))
    assert file.read_bytes() == changed


def test_a_new_snapshot_takes_the_old_ones_place(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "snapshot"
    take_snapshot(target, repository)
    (repository / "trainer" / "new.py").unlink()
    take_snapshot(target, repository)
    assert not (target / "trainer" / "new.py").exists()
    assert [path.name for path in tmp_path.glob(".snapshot*")] == []


def test_what_runs_from_a_snapshot_names_the_commit_it_was_made_of(tmp_path: Path) -> None:
    """Wherever the copy lies: a run's folder may be part of a repository that has moved on."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another state")
    code = take_snapshot(tmp_path / "snapshot")
    ask = "import json; from trainer.run_directory import describe_environment as d; print(json.dumps(d(1, 'cpu')))"
    said = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(tmp_path / "snapshot")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    described = json.loads(said)
    assert (described["git_commit"], described["git_changes"]) == (code.commit, code.changed)


def test_clean_code_says_so(repository: Path) -> None:
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")
    assert not describe_code(repository).changed


def test_installed_packages_are_copied_where_there_is_no_repository(tmp_path: Path) -> None:
    """Site-packages within somebody else's repository are not that repository's code."""
    outer = tmp_path / "project"
    outer.mkdir()
    git(outer, "init", "-q")
    root = outer / ".venv" / "site-packages"
    for name in ("trainer/data/a.py", "trainer/__pycache__/a.pyc", "launch/slurm/job.sh.j2", "torch/huge.so"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (outer / ".gitignore").write_text(".venv/\n")
    assert describe_code(root).commit is None
    assert [str(path) for path in list_files(root)] == ["launch/slurm/job.sh.j2", "trainer/data/a.py"]
    take_snapshot(tmp_path / "copy", root)
    assert (tmp_path / "copy" / "launch" / "slurm" / "job.sh.j2").exists()


def test_data_beside_the_code_is_not_copied_but_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_MOST_MEGABYTES", 1)
    (repository / "features.bin").write_bytes(b"0" * 1_500_000)
    with pytest.raises(InputError, match=r"features.bin \(2 MB\).*name data and results in .gitignore"):
        list_files(repository)
