"""Packed corpora in a real object store behind a network that fails, and the cache in front of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from trainer.data.shards import bounded
from trainer.data.shards import store as store_module
from trainer.data.shards.cache import CachedStore
from trainer.data.shards.remote import ATTEMPTS, RemoteStore, retry_delay
from trainer.data.shards.store import LocalStore, ShardStore, open_store
from trainer.errors import InputError

SHARD = "shards/train-00000.safetensors"
CONTENT = bytes(range(256)) * 400
MANIFEST = b'{"fingerprint": "one"}'
URL = "s3://corpora/phoenix"
SECRET = "nobody-may-read-this"


class Proxy(ThreadingHTTPServer):
    """Stands between the store and us: counts requests and fails those it is told to."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.behind = port
        self.reset()

    def reset(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self.always = ""
        self.awake = threading.Event()

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that hung up."""

    def asked(self, name: str) -> int:
        return sum(path.endswith(name) for _, path in self.requests)


class Forward(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path.partition("?")[0]))
        failure = self.server.always or (self.server.failures.pop(0) if self.server.failures else "")
        if failure in ("500", "503", "429", "403"):
            self.answer(int(failure), b"<Error><Code>Told</Code></Error>", {})
            return
        if failure == "hang":
            self.server.awake.wait()
        if failure in ("drop", "hang"):
            self.close_connection = True
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=20)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding", "date")}
        if failure == "cut":
            # Promises more than it sends.
            self.close_connection = True
            self.answer(answer.status, body[: len(body) // 2], headers)
        elif failure == "short":
            self.answer(answer.status, body[:-1], headers | {"Content-Length": str(len(body) - 1)})
        else:
            self.answer(answer.status, body, headers)
        connection.close()

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def servers() -> Iterator[Proxy]:
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        patch.setenv(f"AWS_{name}", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("NO_PROXY", "*")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket="corpora")
    for name, content in {SHARD: CONTENT, "manifest.json": MANIFEST, "index-train.safetensors": CONTENT[:999]}.items():
        client.put_object(Bucket="corpora", Key=f"phoenix/{name}", Body=content)
    proxy = Proxy(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    yield proxy
    proxy.shutdown()
    moto.stop()
    patch.undo()


@pytest.fixture
def proxy(servers: Proxy) -> Proxy:
    servers.reset()
    return servers


@pytest.fixture(scope="module")
def remote(servers: Proxy) -> RemoteStore:
    return RemoteStore(URL, first_delay=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed corpus in a folder."""
    corpus = tmp_path / "corpus"
    (corpus / "shards").mkdir(parents=True)
    (corpus / SHARD).write_bytes(CONTENT)
    (corpus / "manifest.json").write_bytes(MANIFEST)
    (corpus / "index-train.safetensors").write_bytes(CONTENT[:999])
    return corpus


def read(store: ShardStore, offset: int, length: int, name: str = SHARD) -> bytes:
    buffer = bytearray(length)
    store.read_into(name, offset, memoryview(buffer))
    return bytes(buffer)


def held(cache: Path) -> int:
    return sum(status.st_size for _, status in bounded.files(cache))


def extents(cache: Path, *, whole: bool = False) -> list[str]:
    return sorted(Path(path).name for path, _ in bounded.files(cache) if whole or "/whole/" not in path)


class Counted(LocalStore):
    """Counts what is read of a folder, and holds it up if told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[tuple[str, int, int]] = []
        self.asked, self.go = threading.Event(), threading.Event()
        self.go.set()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name != "manifest.json":
            self.reads.append((name, offset, len(buffer)))
            self.asked.set()
            self.go.wait()
        super().read_into(name, offset, buffer)


def open_files(folder: Path) -> int:
    """How many files below `folder` this process holds open (others it opens and closes at any time)."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found += descriptor.readlink().is_relative_to(folder)
        except FileNotFoundError:  # closed since it was listed, as the one that listed it was
            continue
    return found


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wait_for_waiting(store: CachedStore, count: int) -> None:
    while sum(flight.waiting for flight in store._flights.values()) < count:
        time.sleep(0.001)


# The object store.


def test_ranges_and_sizes_are_those_of_the_file(proxy: Proxy, remote: RemoteStore) -> None:
    for offset, length in ((0, 1), (300, 5000), (len(CONTENT) - 7, 7), (0, len(CONTENT)), (5, 0)):
        assert read(remote, offset, length) == CONTENT[offset : offset + length]
    assert remote.size(SHARD) == len(CONTENT)
    assert remote.local_path("index-train.safetensors").read_bytes() == CONTENT[:999]


def test_a_range_is_one_request(proxy: Proxy, remote: RemoteStore) -> None:
    read(remote, 0, 1)
    proxy.reset()
    read(remote, 100, 50)
    assert [method for method, _ in proxy.requests] == ["GET"]


def test_several_threads_read_at_once(proxy: Proxy) -> None:
    store = RemoteStore(URL)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: read(store, 1000 * i, 1000), range(60)))
    assert b"".join(found) == CONTENT[:60000]


def test_a_forked_process_reads_over_its_own_connection(proxy: Proxy, remote: RemoteStore) -> None:
    read(remote, 0, 10)
    proxy.reset()
    child = multiprocessing.get_context("fork").Process(target=_read_or_die, args=(remote,))
    child.start()
    child.join()
    assert child.exitcode == 0
    # One more by the parent: the child did not cut off the connection that it inherited.
    assert read(remote, 0, 10) == CONTENT[:10]
    assert len(proxy.requests) == 2


def _read_or_die(store: ShardStore) -> None:
    os._exit(0 if read(store, 77, 10) == CONTENT[77:87] else 1)


@pytest.mark.parametrize("url", [f"{URL}/nowhere", "s3://no-such-bucket/phoenix"])
def test_what_is_missing_is_said_at_once(proxy: Proxy, url: str) -> None:
    store = RemoteStore(url)
    for action in (lambda: read(store, 0, 10), lambda: store.size(SHARD)):
        with pytest.raises(
            InputError, match=rf"{url}/{SHARD}: expected a file of the packed corpus, found none; check"
        ):
            action()
    assert sum(method == "GET" and path.endswith(SHARD) for method, path in proxy.requests) == 1


def test_denied_access_is_said_at_once(proxy: Proxy, remote: RemoteStore) -> None:
    proxy.always = "403"
    for action in (lambda: read(remote, 0, 10), lambda: remote.size(SHARD)):
        with pytest.raises(InputError, match=r"access denied .*AWS_ACCESS_KEY_ID") as raised:
            action()
        assert SECRET not in str(raised.value)
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("offset", [len(CONTENT) - 5, len(CONTENT) + 5])
def test_an_object_cut_short_is_said_with_its_size(proxy: Proxy, remote: RemoteStore, offset: int) -> None:
    expected = f"expected {offset + 10} bytes or more, found {len(CONTENT)}; the file is cut short"
    with pytest.raises(InputError, match=expected):
        read(remote, offset, 10)
    assert len(proxy.requests) == 2


# A connection that closes before any answer is tried once more by aiohttp itself: see the next test.
@pytest.mark.parametrize(("failure", "requests"), [("500", 1), ("503", 1), ("429", 1), ("cut", 1), ("drop", 2)])
def test_failures_that_pass_are_told_and_survived(
    proxy: Proxy, remote: RemoteStore, capfd: pytest.CaptureFixture[str], failure: str, requests: int
) -> None:
    proxy.failures = [failure] * 3 * requests
    assert read(remote, 40, 1000) == CONTENT[40:1040]
    # None of botocore's or s3fs's own on top.
    assert len(proxy.requests) == 3 * requests + 1
    told = capfd.readouterr().err.splitlines()
    assert [f"attempt {n} of {ATTEMPTS} failed" in line for n, line in zip((2, 3), told, strict=True)] == [True, True]
    assert all(f"{URL}/{SHARD}" in line and SECRET not in line for line in told)
    assert all((f"HTTP {failure}" in line) == ("HTTP" in line) == failure.isdigit() for line in told)


def test_a_connection_that_idled_too_long_is_no_failure(
    proxy: Proxy, remote: RemoteStore, capfd: pytest.CaptureFixture[str]
) -> None:
    # Servers hang up on a connection that is kept for the next request; aiohttp then takes a new one, once.
    read(remote, 0, 10)
    proxy.reset()
    proxy.failures = ["drop"]
    assert read(remote, 40, 1000) == CONTENT[40:1040]
    assert len(proxy.requests) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("action", ["size", "read_into", "local_path", "warm"])
def test_a_server_that_fails_three_times_and_then_works_stops_nothing(
    proxy: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str], action: str
) -> None:
    store = CachedStore(RemoteStore(URL, first_delay=0.01), tmp_path, 10**6)
    store.local_path("manifest.json")
    proxy.failures = ["500"] * 3
    if action == "size":
        assert store.size(SHARD) == len(CONTENT)
    elif action == "read_into":
        assert read(store, 40, 1000) == CONTENT[40:1040]
    elif action == "local_path":
        assert store.local_path(SHARD).read_bytes() == CONTENT
    else:
        store.warm(SHARD, 40, 1000)
        assert extents(tmp_path) == ["40-1000"]
    assert proxy.failures == []
    assert "HTTP 500" in capfd.readouterr().err


def test_an_answer_too_short_is_asked_for_again(proxy: Proxy, remote: RemoteStore) -> None:
    proxy.failures = ["short", "", "short"]
    assert read(remote, 40, 1000) == CONTENT[40:1040]


def test_a_store_that_always_fails_ends_after_all_attempts(proxy: Proxy, remote: RemoteStore) -> None:
    proxy.always = "500"
    with pytest.raises(InputError, match=rf"{URL}/{SHARD}: cannot be read, {ATTEMPTS} attempts failed \(HTTP 500"):
        read(remote, 0, 10)
    assert len(proxy.requests) == ATTEMPTS


def test_the_delays_grow_and_are_bounded() -> None:
    for first in (0.2, 100.0):
        delays = [retry_delay(first, attempt) for attempt in range(1, ATTEMPTS)]
        assert all(0 < delay <= 5 for delay in delays)
        assert delays[0] <= first
    assert retry_delay(0.2, 4) > retry_delay(0.2, 1)


def test_a_store_that_hangs_is_given_up(proxy: Proxy) -> None:
    proxy.always = "hang"
    try:
        # It hangs until this returns.
        with pytest.raises(InputError, match=rf"{ATTEMPTS} attempts failed \(FSTimeoutError"):
            read(RemoteStore(URL, first_delay=0.01, attempt_seconds=0.2), 0, 10)
    finally:
        proxy.awake.set()


def test_a_store_that_nobody_serves_is_said(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL"):
        read(RemoteStore(URL, first_delay=0.01), 0, 10)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # What was imported before is remembered; `fsspec.registry` is a view, not the module of that name.
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"pip install signscale\[s3\]"):
        read(RemoteStore(URL), 0, 10)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://me:{SECRET}@corpora/phoenix?signature={SECRET}#{SECRET}",
        f"simplecache::s3://{SECRET}@corpora/phoenix",
        f"https://host/phoenix?X-Amz-Signature={SECRET}",
    ],
)
def test_a_location_has_no_secrets(url: str) -> None:
    location = RemoteStore(url).location
    assert SECRET not in location
    assert location.endswith("/phoenix")


def test_an_unknown_protocol_and_secrets_in_an_address() -> None:
    with pytest.raises(InputError, match=r"^nothing://host/corpus: expected an address") as raised:
        read(RemoteStore(f"nothing://me:{SECRET}@host/corpus?signature={SECRET}"), 0, 10)
    assert SECRET not in str(raised.value)


# The folder.


def test_more_files_are_read_than_may_be_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MOST_OPEN", 3)
    for number in range(20):
        (folder / f"{number}").write_bytes(bytes([number]) * 100)
    _read_each(LocalStore(folder), folder)
    assert open_files(folder) == 0


def _read_each(store: LocalStore, folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: read(store, i, 10, str(i % 20)), range(90)))
    assert found == [bytes([i % 20]) * 10 for i in range(90)]
    assert open_files(folder) == 3


def test_a_folder_is_warmed_by_the_kernel(folder: Path) -> None:
    store = LocalStore(folder)
    for offset, length in ((0, 1000), (500, 0), (len(CONTENT), 10)):
        store.warm(SHARD, offset, length)
    assert read(store, 500, 10) == CONTENT[500:510]
    with pytest.raises(InputError, match=r"nowhere: expected a file of the packed corpus, found none"):
        store.warm("nowhere", 0, 10)


def test_only_a_plain_folder_is_local(folder: Path, tmp_path: Path) -> None:
    assert open_store(str(folder)).is_local
    assert not open_store(str(folder), cache_dir=str(tmp_path / "cache")).is_local
    assert not RemoteStore(URL).is_local


# The cache.


def test_what_was_read_once_makes_no_request(proxy: Proxy, tmp_path: Path) -> None:
    store = open_store(URL, cache_dir=str(tmp_path))
    for _ in range(3):
        assert read(store, 500, 100) == CONTENT[500:600]
        assert store.local_path("index-train.safetensors").read_bytes() == CONTENT[:999]
    assert proxy.asked(SHARD) == 1
    again = open_store(URL, cache_dir=str(tmp_path))
    assert again.local_path("manifest.json").read_bytes() == MANIFEST
    proxy.reset()
    assert read(again, 500, 100) == CONTENT[500:600]
    again.local_path("index-train.safetensors")
    assert proxy.requests == []


@pytest.mark.parametrize("offset", [10, len(CONTENT)])
def test_an_extent_that_threads_want_at_once_is_fetched_once(folder: Path, tmp_path: Path, offset: int) -> None:
    inner = Counted(folder)
    inner.go.clear()
    store = CachedStore(inner, tmp_path / "cache", 10**6)
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(read, store, offset, 100) for _ in range(8)]
        wait_for_waiting(store, 7)
        inner.go.set()
    assert len(inner.reads) == 1
    if offset < len(CONTENT):
        assert [each.result() for each in found] == [CONTENT[10:110]] * 8
    else:
        # They fail alike.
        assert len({str(each.exception()) for each in found if isinstance(each.exception(), InputError)}) == 1
        assert all(isinstance(each.exception(), InputError) for each in found)


def test_what_was_warmed_is_read_from_the_cache(proxy: Proxy, tmp_path: Path) -> None:
    store = open_store(URL, cache_dir=str(tmp_path))
    for _ in range(2):
        store.warm(SHARD, 500, 100)
    assert read(store, 500, 100) == CONTENT[500:600]
    assert proxy.asked(SHARD) == 1
    proxy.reset()
    RemoteStore(URL).warm(SHARD, 500, 100)
    assert proxy.requests == []


def test_a_read_waits_for_what_is_being_warmed(folder: Path, tmp_path: Path) -> None:
    inner = Counted(folder)
    inner.go.clear()
    store = CachedStore(inner, tmp_path / "cache", 10**6)
    with ThreadPoolExecutor(3) as pool:
        warmed = pool.submit(store.warm, SHARD, 10, 100)
        inner.asked.wait()
        # On its way already: this one returns at once.
        store.warm(SHARD, 10, 100)
        readers = [pool.submit(read, store, 10, 100) for _ in range(2)]
        wait_for_waiting(store, 2)
        inner.go.set()
        warmed.result()
        assert [reader.result() for reader in readers] == [CONTENT[10:110]] * 2
    assert inner.reads == [(SHARD, 10, 100)]


def test_warming_asks_for_nothing_that_cannot_be_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Counted(folder)
    store = CachedStore(inner, tmp_path / "cache", 5000)
    for offset in range(0, 50_000, 1000):
        store.warm(SHARD, offset, 1000)
        assert held(tmp_path / "cache") <= 5000
    assert len(inner.reads) == 50
    store.local_path(SHARD)
    inner.reads.clear()
    # More than the cache takes at all, none, more than the whole file leaves.
    for length in (5001, 0, 1000):
        store.warm(SHARD, 0, length)
    assert inner.reads == []
    monkeypatch.setattr(os, "ftruncate", full)
    other = CachedStore(inner, tmp_path / "other", 5000)
    for _ in range(2):
        other.warm(SHARD, 0, 1000)
    assert inner.reads == []


def test_what_cannot_be_warmed_is_said_to_all_who_wait(folder: Path, tmp_path: Path) -> None:
    store = CachedStore(LocalStore(folder), tmp_path / "cache", 10**6)
    with pytest.raises(InputError, match="the file is cut short"):
        store.warm(SHARD, len(CONTENT), 10)
    assert held(tmp_path / "cache") == 0
    assert int((tmp_path / "cache" / ".usage").read_text()) == 0


def test_the_least_recently_used_goes_first(folder: Path, tmp_path: Path) -> None:
    inner = Counted(folder)
    store = CachedStore(inner, tmp_path / "cache", 10_000)
    for offset in (0, 3000, 6000):
        read(store, offset, 3000)
    read(store, 0, 3000)
    read(store, 9000, 3000)
    assert extents(tmp_path / "cache") == ["0-3000", "6000-3000", "9000-3000"]
    inner.reads.clear()
    assert read(store, 0, 3000) == CONTENT[:3000]
    assert inner.reads == []


def test_a_smaller_limit_holds_from_the_start(folder: Path, tmp_path: Path) -> None:
    store = CachedStore(LocalStore(folder), tmp_path / "cache", 10**6)
    for offset in range(0, 50_000, 1000):
        read(store, offset, 1000)
    assert held(tmp_path / "cache") == 50_000
    CachedStore(LocalStore(folder), tmp_path / "cache", 20_000)
    assert 10_000 < held(tmp_path / "cache") <= 20_000


def test_a_record_larger_than_the_cache_is_read_past_it(folder: Path, tmp_path: Path) -> None:
    store = CachedStore(LocalStore(folder), tmp_path / "cache", 1000)
    assert read(store, 0, 5000) == CONTENT[:5000]
    assert extents(tmp_path / "cache") == []


def test_whole_files_count_and_stay(folder: Path, tmp_path: Path) -> None:
    store = CachedStore(LocalStore(folder), tmp_path / "cache", 5000)
    index = store.local_path("index-train.safetensors")
    for offset in range(0, 50_000, 1000):
        assert read(store, offset, 1000) == CONTENT[offset : offset + 1000]
        assert held(tmp_path / "cache") <= 5000
    assert index.read_bytes() == CONTENT[:999]


READER = """
import random, sys
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from trainer.data.shards.cache import CachedStore
from trainer.data.shards.store import LocalStore
content = bytes(range(256)) * 400
store = CachedStore(LocalStore(Path(sys.argv[1])), Path(sys.argv[2]), 30_000)
def check(offset):
    buffer = bytearray(1000)
    store.read_into("shards/train-00000.safetensors", offset, memoryview(buffer))
    assert buffer == content[offset : offset + 1000]
draw = random.Random(int(sys.argv[3]))
with ThreadPoolExecutor(4) as pool:
    list(pool.map(check, [1000 * draw.randrange(100) for _ in range(1500)]))
"""


def test_the_limit_holds_while_threads_of_two_processes_read(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", READER, str(folder), str(cache)]
    readers = [subprocess.Popen([*command, seed], stderr=subprocess.PIPE, text=True) for seed in "12"]
    most = 0
    while any(reader.poll() is None for reader in readers):
        # Under the lock nothing moves, so that this is the truth.
        with contextlib.suppress(FileNotFoundError), _still(cache):
            most = max(most, held(cache))
        time.sleep(0.01)
    for reader in readers:
        assert reader.wait() == 0, reader.communicate()[1]
        assert reader.communicate()[1] == ""
    assert 20_000 < most <= 30_000
    assert int((cache / ".usage").read_text()) >= held(cache)


@contextlib.contextmanager
def _still(cache: Path) -> Iterator[None]:
    with (cache / ".usage").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_damaged_extent_is_fetched_again_when_dropped(folder: Path, tmp_path: Path) -> None:
    inner = Counted(folder)
    store = CachedStore(inner, tmp_path / "cache", 10**6)
    read(store, 0, 1000)
    (path,) = (tmp_path / "cache").rglob("0-1000")
    path.write_bytes(b"x" * 1000)
    assert read(store, 0, 1000) == b"x" * 1000
    store.discard(SHARD, 0, 1000)
    assert read(store, 0, 1000) == CONTENT[:1000]
    path.write_bytes(b"cut")
    assert read(store, 0, 1000) == CONTENT[:1000]
    index = store.local_path("index-train.safetensors")
    index.write_bytes(b"damaged")
    store.discard("index-train.safetensors")
    assert store.local_path("index-train.safetensors").read_bytes() == CONTENT[:999]
    store.discard(SHARD, 5, 5)


def test_a_corpus_packed_anew_is_not_mixed_with_the_old_one(folder: Path, tmp_path: Path) -> None:
    inner = LocalStore(folder)
    store = CachedStore(inner, tmp_path / "cache", 10**6)
    store.local_path("index-train.safetensors")
    read(store, 0, 100)
    (folder / "manifest.json").write_bytes(b'{"fingerprint": "two"}')
    (folder / SHARD).write_bytes(CONTENT[::-1])
    (folder / "index-train.safetensors").write_bytes(b"new")
    again = CachedStore(LocalStore(folder), tmp_path / "cache", 10**6)
    assert again.local_path("manifest.json").read_bytes() == b'{"fingerprint": "two"}'
    assert again.local_path("index-train.safetensors").read_bytes() == b"new"
    assert read(again, 0, 100) == CONTENT[::-1][:100]


@pytest.mark.parametrize("place", [(tempfile, "mkstemp"), (os, "ftruncate"), (bounded.NewFile, "write")])
def test_a_full_disk_costs_the_cache_and_not_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    place: tuple[Any, str],
) -> None:
    store = CachedStore(LocalStore(folder), tmp_path / "cache", 10**6)
    read(store, 0, 1000)
    monkeypatch.setattr(*place, full)
    for offset in range(0, 5000, 1000):
        assert read(store, offset, 1000) == CONTENT[offset : offset + 1000]
    assert store.local_path("index-train.safetensors") == folder / "index-train.safetensors"
    monkeypatch.undo()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert extents(tmp_path / "cache") == ["0-1000"]
    assert int((tmp_path / "cache" / ".usage").read_text()) == 1000


STUCK = """
import sys, time
from pathlib import Path
from trainer.data.shards import store as store_module
from trainer.data.shards.cache import CachedStore
from trainer.data.shards.store import LocalStore
store_module._BLOCK = 1000
class Stuck(LocalStore):
    def read_into(self, name, offset, buffer):
        super().read_into(name, offset, buffer)
        if name != "manifest.json" and offset:
            print("stuck", flush=True)
            time.sleep(600)
store = CachedStore(Stuck(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
store.read_into("shards/train-00000.safetensors", 0, memoryview(bytearray(1000)))
if sys.argv[4] == "extent":
    store.read_into("shards/train-00000.safetensors", 5000, memoryview(bytearray(20_000)))
else:
    store.local_path("shards/train-00000.safetensors")
"""


@pytest.mark.parametrize(("what", "size"), [("extent", 20_000), ("whole file", len(CONTENT))])
def test_what_a_killed_process_left_half_written_is_never_read_and_goes(
    folder: Path, tmp_path: Path, what: str, size: int
) -> None:
    cache, limit = tmp_path / "cache", size + 10_000
    command = [sys.executable, "-c", STUCK, str(folder), str(cache), str(limit), what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stuck\n"
        # While it lives, its room is taken, and nobody takes its file away.
        neighbour = CachedStore(LocalStore(folder), cache, limit)
        assert held(cache) == 1000 + size
        assert read(neighbour, 5000, 20_000) == CONTENT[5000:25_000]
        assert [name.endswith(".tmp") for name in extents(cache, whole=True)] == [True, False]
    finally:
        process.kill()
        process.communicate()
    assert read(neighbour, 5000, 20_000) == CONTENT[5000:25_000]
    # Found when room was needed: all of it is used again, no more than it.
    assert extents(cache, whole=True) == ["0-1000", "5000-20000"]
    assert int((cache / ".usage").read_text()) == held(cache) == 21_000


def test_processes_killed_at_any_moment_leave_a_cache_that_works(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for seed in range(5):
        reader = subprocess.Popen([sys.executable, "-c", READER, str(folder), str(cache), str(seed)])
        before = _written(cache)
        while reader.poll() is None and _written(cache) == before:
            time.sleep(0.001)
        time.sleep(0.01 * seed)
        reader.kill()
        reader.wait()
        assert held(cache) <= 30_000
    survivor = CachedStore(LocalStore(folder), cache, 30_000)
    for offset in range(0, len(CONTENT) - 1000, 1000):
        assert read(survivor, offset, 1000) == CONTENT[offset : offset + 1000]
    assert not [name for name in extents(cache) if name.endswith(".tmp")]
    assert int((cache / ".usage").read_text()) == held(cache) > 20_000


def _written(cache: Path) -> list[str]:
    return extents(cache) if cache.exists() else []


def test_processes_of_a_node_share_what_they_fetched(folder: Path, tmp_path: Path) -> None:
    for expected in (100, 0):
        count = multiprocessing.get_context("fork").SimpleQueue()
        child = multiprocessing.get_context("fork").Process(target=_read_all, args=(folder, tmp_path / "cache", count))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert count.get() == expected


def _read_all(folder: Path, cache: Path, count: Any) -> None:
    inner = Counted(folder)
    store = CachedStore(inner, cache, 10**6)
    with ThreadPoolExecutor(4) as pool:
        for offset, found in enumerate(pool.map(lambda i: read(store, 1000 * (i % 100), 1000), range(300))):
            assert found == CONTENT[1000 * (offset % 100) :][:1000]
    count.put(len(inner.reads))


def test_an_extent_that_two_processes_fetched_at_once_counts_once(folder: Path, tmp_path: Path) -> None:
    inner = Counted(folder)
    inner.go.clear()
    one, two = (CachedStore(each, tmp_path / "cache", 10**6) for each in (inner, LocalStore(folder)))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(read, one, 10, 100)
        inner.asked.wait()
        assert read(two, 10, 100) == CONTENT[10:110]
        inner.go.set()
        assert slow.result() == CONTENT[10:110]
    assert int((tmp_path / "cache" / ".usage").read_text()) == held(tmp_path / "cache") == 100


def test_a_forked_process_waits_for_no_thread_of_its_parent(folder: Path, tmp_path: Path) -> None:
    inner = Counted(folder)
    inner.go.clear()
    store = CachedStore(inner, tmp_path / "cache", 10**6)
    with ThreadPoolExecutor(1) as pool:
        parents = pool.submit(read, store, 77, 10)
        inner.asked.wait()
        child = multiprocessing.get_context("fork").Process(target=_go_and_read, args=(inner, store))
        child.start()
        child.join(30)
        child.kill()
        inner.go.set()
        assert parents.result() == CONTENT[77:87]
    child.join()
    assert child.exitcode == 0


def _go_and_read(inner: Counted, store: ShardStore) -> None:
    inner.go.set()
    _read_or_die(store)


def test_a_fork_in_the_middle_of_everything_blocks_nobody(folder: Path, tmp_path: Path) -> None:
    store = CachedStore(LocalStore(folder), tmp_path / "cache", 30_000)
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(read, store, 1000 * (i % 100), 1000) for i in range(2000)]
        children: list[Any] = []
        while not all(each.done() for each in busy) and len(children) < 8:
            child = multiprocessing.get_context("fork").Process(target=_read_or_die, args=(store,))
            child.start()
            children.append(child)
        for child in children:
            child.join()
    assert children
    assert [child.exitcode for child in children] == [0] * len(children)
    assert [each.result() for each in busy] == [CONTENT[1000 * (i % 100) :][:1000] for i in range(2000)]


def test_a_cache_that_cannot_be_written_is_said_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/cache: the cache's folder cannot be written \(.*cache_dir"):
        open_store(str(folder), cache_dir=str(tmp_path / "file" / "cache"))


def test_open_store_takes_what_the_location_needs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    assert isinstance(open_store(str(folder)), LocalStore)
    cached = open_store(str(folder), cache_dir=str(tmp_path / "cache"))
    assert isinstance(cached, CachedStore)
    assert read(cached, 3, 100) == CONTENT[3:103]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert read(open_store(URL), 3, 100) == CONTENT[3:103]
    assert held(tmp_path / "home" / "signscale") == 100
    with pytest.raises(InputError, match="cache_gb"):
        open_store(URL, cache_gb=0)


def test_a_record_is_seen_where_it_lies_until_its_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "is_on_local_disk", lambda path: True)
    store = LocalStore(folder)
    view = store.view(SHARD, 40, 1000)
    assert view is not None
    assert view.readonly
    assert bytes(view) == CONTENT[40:1040]
    assert store.view(SHARD, len(CONTENT) - 10, 11) is None
    # Touching what a file has lost kills a process; from now on reading says what is wrong in words.
    os.truncate(folder / SHARD, 500)
    assert store.view(SHARD, 40, 100) is None
    with pytest.raises(InputError, match="the file is cut short"):
        read(store, 40, 1000)


def test_records_on_a_network_are_read_and_not_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = (
        "/dev/root / ext4 rw 0 0\nnas:/x /mnt/lab\\040data nfs4 rw 0 0\ntmpfs /mnt/lab\\040data/fast tmpfs rw 0 0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: mounts)
    on_local_disk = store_module.is_on_local_disk.__wrapped__
    assert on_local_disk(Path("/home/me/corpus"))
    assert not on_local_disk(Path("/mnt/lab data/corpus"))
    assert on_local_disk(Path("/mnt/lab data/fast"))
    assert on_local_disk(Path("/mnt/lab database"))
    monkeypatch.setattr(store_module, "is_on_local_disk", lambda path: False)
    assert LocalStore(folder).view(SHARD, 0, 10) is None
