"""`signscale pack` as a command: killed, stopped, out of room or short of a worker, the same command goes on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.pack import main as pack_command
from tests.conftest import ROOT, environment
from tests.data.test_pack import files_of
from trainer.data.synthetic import SyntheticSpec, write_corpus
from trainer.errors import InputError

FLAGS = ["--shard_mb", "0.3", "--dtype", "float32"]
SCANNED, WRITTEN = "scan/*.safetensors", "written/*.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough clips that a packing can be met in the middle."""
    out = tmp_path_factory.mktemp("source") / "synthetic"
    write_corpus(SyntheticSpec(clips=700, seed=2, vocabulary_size=8, feature_dim=64), out, lambda text: None)
    return out


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What packing gives when nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert finish(start(source, out))[0] == 0
    return files_of(out)


def start(source: Path, out: Path, *flags: str, **settings: object) -> subprocess.Popen[str]:
    """Start the command, in a process group of its own."""
    command = [sys.executable, "-m", "launch.cli", "pack", str(source), str(out), "--workers", "1", *FLAGS, *flags]
    return subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **settings,  # type: ignore[call-overload]
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end; return exit code and what was printed."""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output + errors


def meet(source: Path, out: Path, files: str, act: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Act on a packing as soon as it has finished some `files` of its state, and see that it was not yet done."""
    for attempt in range(5):
        process = start(source, out, *(["--restart"] if attempt else []))
        while process.poll() is None and not any(out.with_name("out.packing").glob(files)):
            time.sleep(0.002)
        if process.poll() is None:
            act(process)
        code, shown = finish(process)
        if not out.exists():
            return code, shown
        # It was faster than this test: once more.
        shutil.rmtree(out)
    pytest.fail("no packing could be met in the middle")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """List the worker processes of a command."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    """Tell whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("files", [SCANNED, WRITTEN])
def test_killed_in_either_pass_it_goes_on_and_gives_the_same_bytes(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, files: str
) -> None:
    out, state = tmp_path / "out", tmp_path / "out.packing"
    workers: list[int] = []

    def kill(process: subprocess.Popen[str]) -> None:
        workers.extend(workers_of(process))
        process.kill()

    assert meet(source, out, files, kill)[0] == -signal.SIGKILL
    assert workers
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker outlives the command"
        time.sleep(0.05)
    # Flags of another packing are refused, and nothing is lost by asking.
    code, shown = finish(start(source, out, "--dtype", "float16"))
    assert code == 2
    assert "--dtype: float32 then, float16 now" in shown
    assert "--restart" in shown
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in state.glob("corpus/shards/train*")}
    finished = {path.name for path in state.glob(WRITTEN)}
    assert bool(finished) == (files == WRITTEN)
    code, shown = finish(start(source, out))
    assert code == 0
    assert "going on" in shown
    assert "Traceback" not in shown
    assert files_of(out) == undisturbed
    for name in finished:
        path = out / "shards" / name
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == kept[name]
    assert not state.exists()


def test_finished_work_of_the_first_pass_is_not_done_again(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    corpus, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, corpus)
    meet(corpus, out, SCANNED, lambda process: process.kill())
    # A clip of the first chunk, damaged behind the back of sizes and times: only who reads it anew can tell.
    first = corpus / "train" / sorted(path.name for path in (corpus / "train").iterdir())[0]
    status, content = first.stat(), first.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    first.write_bytes(damaged)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    code, shown = finish(start(corpus, out))
    assert code == 2
    assert f"{first}: changed while it was being packed" in shown
    first.write_bytes(content)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert finish(start(corpus, out))[0] == 0
    assert files_of(out) == undisturbed
    # The source changed since: a packing that was begun is not mixed with it.
    shutil.rmtree(out)
    meet(corpus, out, SCANNED, lambda process: process.kill())
    os.utime(first)
    code, shown = finish(start(corpus, out))
    assert code == 2
    assert "times of change" in shown
    assert finish(start(corpus, out, "--restart"))[0] == 0
    assert files_of(out) == undisturbed


@pytest.mark.parametrize(("number", "files"), [(signal.SIGINT, SCANNED), (signal.SIGTERM, WRITTEN)])
def test_a_signal_to_the_whole_group_leaves_a_packing_that_goes_on(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, number: signal.Signals, files: str
) -> None:
    code, shown = meet(source, tmp_path / "out", files, lambda process: os.killpg(process.pid, number))
    assert code == 130
    assert "Traceback" not in shown
    assert "the same command goes on" in shown
    assert finish(start(source, tmp_path / "out"))[0] == 0
    assert files_of(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("files", [SCANNED, WRITTEN])
def test_a_worker_that_is_killed_ends_the_command(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, files: str
) -> None:
    def kill_worker(process: subprocess.Popen[str]) -> None:
        for pid in workers_of(process):
            os.kill(pid, signal.SIGKILL)

    code, shown = meet(source, tmp_path / "out", files, kill_worker)
    assert code == 1
    assert "a worker process ended by itself" in shown
    assert "Traceback" not in shown
    assert finish(start(source, tmp_path / "out"))[0] == 0
    assert files_of(tmp_path / "out") == undisturbed


def test_no_room_while_writing_is_one_clear_error(source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = 200_000
    code, shown = finish(
        start(source, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    )
    assert code == 2
    assert shown.count("error:") == 1
    assert "no room to write (File too large)" in shown
    assert "goes on where this one ended" in shown
    assert "Traceback" not in shown
    assert not out.exists()
    assert any((tmp_path / "out.packing").glob(SCANNED))
    assert finish(start(source, out))[0] == 0
    assert files_of(out) == undisturbed


def test_two_packings_of_one_folder_do_not_mix(source: Path, tmp_path: Path) -> None:
    shown = []

    def start_another(process: subprocess.Popen[str]) -> None:
        os.kill(process.pid, signal.SIGSTOP)
        shown.append(finish(start(source, tmp_path / "out")))
        process.kill()

    meet(source, tmp_path / "out", SCANNED, start_another)
    assert shown[-1][0] == 2
    assert "another process is packing there" in shown[-1][1]


def test_a_disk_too_small_is_seen_before_the_shards_are_written(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=2m none "$0" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, str(disk)]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    pack = [sys.executable, "-m", "launch.cli", "pack", str(source), str(disk / "out"), "--workers", "1", *FLAGS]
    done = subprocess.run([*command, *pack], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "MB more" in done.stderr
    assert "MB are free; make room" in done.stderr


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys, launch.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment(), cwd=ROOT).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "pack", "--help"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "OUT.packing" in done.stdout


def test_places_that_cannot_be_packed_from_or_to_are_refused(corpus: Path, tmp_path: Path) -> None:
    for source, out, message in (
        (str(corpus), "s3://bucket/corpus", "OUT: expected a folder, found the address s3://bucket/corpus"),
        ("s3://bucket/corpus", str(tmp_path / "out"), "SOURCE: expected a folder, found the address"),
        (str(corpus), str(corpus / "train" / "out"), "OUT: .* lies inside SOURCE"),
    ):
        with pytest.raises(InputError, match=message):
            pack_command([source, out])
    packed = tmp_path / "packed"
    assert pack_command([str(corpus), str(packed), "--workers", "1", "--splits", "train"]) == 0
    with pytest.raises(InputError, match="is packed already; name the corpus it was packed from"):
        pack_command([str(packed), str(tmp_path / "again")])
