"""Training from shards: the losses of the folder they were packed from, on any ranks, after a kill, and over S3."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from tests.conftest import ROOT, TINY, column, command, environment, launch, pack, train, weights
from tests.distributed.test_resume import RUN, _wait_for_step

SAME = [*RUN, "--max_steps", "15"]


@pytest.fixture(scope="module")
def float32(corpus: Path) -> Path:
    return pack(corpus, corpus.with_name("packed_for_training"), "--dtype", "float32")


@pytest.fixture(scope="module")
def from_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the npz files, augmentation, mixup and dropout on."""
    run = tmp_path_factory.mktemp("folder") / "run"
    train(1, corpus, run, *SAME)
    return run


def test_float32_shards_train_to_the_bits_of_their_folder(from_folder: Path, float32: Path, tmp_path: Path) -> None:
    train(1, float32, tmp_path / "run", *SAME)
    assert column(tmp_path / "run", "train/loss") == column(from_folder, "train/loss")
    assert weights(tmp_path / "run") == weights(from_folder)


def test_float32_shards_on_two_ranks_follow_the_same_curve(from_folder: Path, float32: Path, tmp_path: Path) -> None:
    train(2, float32, tmp_path / "run", *SAME, "--max_frames_per_microbatch", "150")
    losses = column(from_folder, "train/loss")
    np.testing.assert_allclose(column(tmp_path / "run", "train/loss"), losses, rtol=2e-5)


def test_a_run_goes_on_from_its_folder_to_its_shards_and_from_another_world_size(
    corpus: Path, from_folder: Path, float32: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(1, corpus, run, *SAME, "--stop_after_steps", "8")
    train(2, float32, run, *SAME, "--resume", "auto")
    losses = column(from_folder, "train/loss")
    np.testing.assert_allclose(column(run, "train/loss"), losses, rtol=1e-4)


@pytest.mark.parametrize("packed", ["float16"], indirect=True)
def test_a_run_on_shards_that_is_killed_ends_in_the_same_bits(packed: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(2, packed, whole, *RUN)
    at = random.randint(4, 12)
    print(f"killed after step {at}")
    flags = ["--data_dir", str(packed), "--output_dir", str(run), *TINY, *RUN]
    process = subprocess.Popen(
        command(2, "trainer.train", flags),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for_step(run, at, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(column(run, "train/loss")) < 24, "the run ended before it was killed"
    train(2, packed, run, *RUN, "--resume", "auto")
    assert weights(run) == weights(whole)
    assert column(run, "train/loss") == column(whole, "train/loss")


def test_evaluation_on_shards_counts_what_it_counts_on_files(
    from_folder: Path, float32: Path, corpus: Path, tmp_path: Path
) -> None:
    reports = {}
    for name, data_dir, world_size in (("files", corpus, 1), ("shards", float32, 2)):
        flags = ["--checkpoint", str(from_folder), "--split", "test", "--data_dir", str(data_dir)]
        launch(world_size, "trainer.evaluate", [*flags, "--output_dir", str(tmp_path / name)])
        reports[name] = [(tmp_path / name / f"test.{kind}").read_text() for kind in ("json", "ctm", "stm")]
    losses = [json.loads(report[0]).pop("loss") for report in reports.values()]
    # Two ranks lay clips into other cells than one, and a kernel may round otherwise; what is counted is the same.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    counted = [(json.loads(report[0]) | {"loss": None}, *report[1:]) for report in reports.values()]
    assert counted[0] == counted[1]


def test_a_damaged_record_ends_the_run_by_name_with_exit_code_2(float32: Path, tmp_path: Path) -> None:
    folder = pack(float32.with_name("synthetic"), tmp_path / "damaged", "--dtype", "float32")
    shard = sorted((folder / "shards").glob("train-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    done = train(1, folder, tmp_path / "run", *RUN, check=False)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: {folder}/shards/{shard.name}: the record of clip train-")
    assert "Traceback" not in done.stderr


def test_a_cost_model_is_obeyed_and_changes_no_loss(from_folder: Path, float32: Path, tmp_path: Path) -> None:
    model = tmp_path / "cost_model.json"
    fitted = {"per_slot": 1e-5, "per_walk": 1e-4, "per_cell": 1e-3, "samples": 100, "residual": 0.01}
    model.write_text(f'{{"format": "signscale-cost-model", "version": 1, {str(fitted)[1:]}'.replace("'", '"'))
    train(2, float32, tmp_path / "run", *SAME, "--cost_model", str(model))
    np.testing.assert_allclose(column(tmp_path / "run", "train/loss"), column(from_folder, "train/loss"), rtol=2e-5)
    refused = train(1, float32, tmp_path / "other", *SAME, "--cost_model", str(tmp_path / "none.json"), check=False)
    assert refused.returncode == 2
    assert "none.json: cost model cannot be read" in refused.stderr
    assert not (tmp_path / "other").exists()


# Over S3.


@pytest.fixture(scope="module")
def bucket(float32: Path) -> Iterator[dict[str, str]]:
    """The packed corpus in a real S3 server; yields what a process needs to reach it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    access = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:%d" % server.get_host_and_port()[1],  # noqa: UP031
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "nobody-may-read-this",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "*",
    }
    client = boto3.client(
        "s3",
        endpoint_url=access["AWS_ENDPOINT_URL"],
        aws_access_key_id="reader",
        aws_secret_access_key="nobody-may-read-this",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="corpora")
    for path in sorted(path for path in float32.rglob("*") if path.is_file()):
        client.upload_file(str(path), "corpora", f"signs/{path.relative_to(float32)}")
    yield access
    server.stop()


def test_two_ranks_train_over_s3_to_the_same_losses_with_a_bounded_cache(
    from_folder: Path, bucket: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    cache, biggest = tmp_path / "cache", 0
    done = threading.Event()

    def watch() -> None:
        nonlocal biggest
        while not done.wait(0.02):
            biggest = max(biggest, held(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run = tmp_path / "run"
    # Room for about half of the training clips: some are fetched again in the second epoch.
    train(2, "s3://corpora/signs", run, *SAME, "--cache_dir", str(cache), "--cache_gb", "0.0003")  # type: ignore[arg-type]
    done.set()
    watcher.join()
    np.testing.assert_allclose(column(run, "train/loss"), column(from_folder, "train/loss"), rtol=2e-5)
    assert 0 < biggest <= 300_000
    assert bucket["AWS_SECRET_ACCESS_KEY"] not in (run / "recipe.yaml").read_text()


def test_an_address_that_holds_no_corpus_is_said_with_exit_code_2(
    bucket: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = train(1, "s3://corpora/nothing", tmp_path / "run", *SAME, check=False)  # type: ignore[arg-type]
    assert done.returncode == 2
    assert "s3://corpora/nothing/manifest.json: expected a file of the packed corpus, found none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def held(folder: Path) -> int:
    """Bytes of all files; other processes remove some meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
