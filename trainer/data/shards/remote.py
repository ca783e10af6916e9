"""Packed corpora in object stores, read through fsspec by byte ranges, with retries of our own."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainer.data.shards.store import blocks, reset_after_fork
from trainer.errors import InputError

T = TypeVar("T")

ATTEMPTS = 6
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 5.0
_ATTEMPT_SECONDS = 60.0
_TRANSIENT_STATUS = (408, 425, 429)
_BROKEN_NAMES = {
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "ResponseParserError",
    "ResponseStreamingError",
    "ClientConnectionError",
    "ClientPayloadError",
}
"""Failures of the connection by the names of their classes: botocore and aiohttp are there for some protocols only, and
botocore's `ConnectionError` is not Python's."""
_CREDENTIALS = (
    "give the store's credentials by its usual variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "FSSPEC_S3_ANON=true for a public bucket)"
)
# Not the global generator: a failing network must not change what the run draws.
_jitter = random.Random()
_inherited: list[Any] = []
"""Connections of the process this one was forked from. They are never let go: their end may take the parent's sockets
off the epoll that both share, and the parent then waits in vain for an answer."""


class RemoteStore:
    """A folder of an object store, at an address that fsspec understands, such as `s3://bucket/corpus`."""

    is_local = False

    def __init__(
        self, url: str, *, first_delay: float = _FIRST_DELAY, attempt_seconds: float = _ATTEMPT_SECONDS
    ) -> None:
        self.location = _without_secrets(url)
        self._url = url
        self._first_delay = first_delay
        self._attempt_seconds = attempt_seconds
        self._connected: tuple[Any, str] | None = None
        self.after_fork()
        reset_after_fork(self)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on, by one request of that range."""
        if not len(buffer):
            return
        stop = offset + len(buffer)

        def fetch() -> None:
            fs, root = self._connect()
            try:
                data = fs.cat_file(f"{root}/{name}", start=offset, end=stop, **self._timeout(fs))
            except Exception as error:
                if _status(error) == 416:
                    raise _ShortReadError(0) from error
                raise
            if len(data) > len(buffer):
                raise InputError(
                    f"{self.location}/{name}: asked for {len(buffer)} bytes, got {len(data)}; the store does not serve "
                    "byte ranges: copy the corpus to one that does, or to a folder"
                )
            if len(data) < len(buffer):
                raise _ShortReadError(len(data))
            buffer[:] = data

        self._retry(name, fetch, stop)

    def view(self, name: str, offset: int, length: int) -> memoryview | None:
        """Return None: nothing is here."""
        return None

    def warm(self, name: str, offset: int, length: int) -> None:
        """Do nothing: nothing is kept here."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

        def ask() -> int:
            fs, root = self._connect()
            found = fs.info(f"{root}/{name}", **self._timeout(fs))
            if found["type"] != "file" or found["size"] is None:
                raise FileNotFoundError
            return int(found["size"])

        return self._retry(name, ask)

    def local_path(self, name: str) -> Path:
        """Fetch a file into a temporary folder that goes with this store; return its path."""
        try:
            folder = self._temporary_folder()
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                try:
                    for block in blocks(self, name):
                        file.write(block)
                    file.flush()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink()
                    raise
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: {self.location}/{name} cannot be kept there ({error.strerror or error}); "
                "make room, or let TMPDIR name another folder"
            ) from None
        return path

    def discard(self, name: str, offset: int = 0, length: int | None = None) -> None:
        """Do nothing: nothing is kept here."""

    def after_fork(self) -> None:
        """Take a lock, a connection and a temporary folder of this process's own."""
        if self._connected is not None:
            _inherited.append(self._connected)
        self._lock = threading.Lock()
        self._connected = None
        self._downloads: Path | None = None

    def _connect(self) -> tuple[Any, str]:
        with self._lock:
            if self._connected is None:
                self._connected = _open(self._url, self.location)
            return self._connected

    def _temporary_folder(self) -> Path:
        with self._lock:
            if self._downloads is None:
                self._downloads = Path(tempfile.mkdtemp(prefix="signscale-"))
                weakref.finalize(self, _remove, self._downloads, os.getpid())
            return self._downloads

    def _timeout(self, fs: Any) -> dict[str, float]:
        # The protocols' own timeouts are between two bytes: an answer that drips would take for ever.
        return {"timeout": self._attempt_seconds} if fs.async_impl else {}

    def _retry(self, name: str, action: Callable[[], T], stop: int | None = None) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except InputError:
                raise
            except Exception as error:
                failure: Exception = error
            if isinstance(failure, _ShortReadError) and stop is not None:
                # Either the connection broke or the object ends there; only its size tells.
                size = self.size(name)
                if size < stop:
                    raise InputError(
                        f"{self.location}/{name}: expected {stop} bytes or more, found {size}; the file is cut short: "
                        "copy it again or pack the corpus anew"
                    ) from None
            elif not _is_transient(failure):
                raise self._describe(name, failure) from None
            if attempt == ATTEMPTS:
                break
            delay = retry_delay(self._first_delay, attempt)
            if attempt > 1:
                print(
                    f"warning: {self.location}/{name}: attempt {attempt} of {ATTEMPTS} failed ({_reason(failure)}); "
                    f"next in {delay:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(delay)
        raise InputError(
            f"{self.location}/{name}: cannot be read, {ATTEMPTS} attempts failed ({_reason(failure)}); check that the "
            "store answers and its address is right (AWS_ENDPOINT_URL for one that is not Amazon's), then start again"
        )

    def _describe(self, name: str, error: Exception) -> InputError:
        where, status = f"{self.location}/{name}", _status(error)
        if isinstance(error, FileNotFoundError) or status == 404:
            return InputError(
                f"{where}: expected a file of the packed corpus, found none; check the address, bucket included, copy "
                "it again or pack anew"
            )
        if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
            return InputError(f"{where}: access denied ({_reason(error)}); {_CREDENTIALS}, and the right to read there")
        return InputError(f"{where}: cannot be read ({_reason(error)}); mend the address or the store's configuration")


def retry_delay(first: float, attempt: int) -> float:
    """Return the seconds to wait after a failed attempt, the first of which is 1: up to twice as many each time."""
    # Uneven, or a thousand ranks that failed together would ask again together.
    return min(first * 2 ** (attempt - 1), _LONGEST_DELAY) * _jitter.uniform(0.5, 1.0)


class _ShortReadError(Exception):
    """Tell that fewer bytes came than were asked for."""


def _open(url: str, location: str) -> tuple[Any, str]:
    # Imported where it is used: it costs tenths of a second that a corpus in a folder need not pay.
    import fsspec

    protocol = url.partition("://")[0]
    s3 = protocol in ("s3", "s3a")
    options: dict[str, Any] = {"skip_instance_cache": True}
    if s3:
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        # botocore tries a 500 five times and s3fs a broken connection five by five times more, all silently: one place
        # alone may retry, or nobody knows how long a dead store holds a run. (aiohttp's own second try, at a
        # connection that closes before any answer, costs no delay and stays: idle connections end that way.)
        once = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64}
        options["config_kwargs"] = {**configured, **once}
    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
    except ImportError:
        mend = "pip install signscale[s3]" if s3 else f"the package that fsspec needs for {protocol}"
        raise InputError(
            f"{location}: reading {protocol}:// needs a package that is missing; install it: {mend}"
        ) from None
    except Exception as error:
        raise InputError(
            f"{location}: expected an address that fsspec understands, such as s3://bucket/folder "
            f"({type(error).__name__}); mend it"
        ) from None
    if s3:
        fs.retries = 1
    return fs, root.rstrip("/")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_broken(error: BaseException) -> bool:
    return any(
        isinstance(link, TimeoutError | ConnectionError)
        or _BROKEN_NAMES & {base.__name__ for base in type(link).__mro__}
        for link in _chain(error)
    )


def _status(error: BaseException) -> int | None:
    if _is_broken(error):
        # aiohttp gives an answer that breaks off the code 400, which no server said.
        return None
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(link, "status", None) or getattr(link, "code", None)
        if isinstance(found, int):
            return found
    return None


def _is_transient(error: Exception) -> bool:
    # Some stores answer an overload with 400 or 403 and this code.
    if _is_broken(error) or _code(error) in ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"):
        return True
    status = _status(error)
    return status is not None and (status >= 500 or status in _TRANSIENT_STATUS)


def _code(error: BaseException) -> str:
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _reason(error: BaseException) -> str:
    # Never the error's own text: it may quote an address with its signature, or a key.
    status, code = _status(error), _code(error)
    if isinstance(error, _ShortReadError):
        return f"the answer ended after {error.args[0]} bytes"
    if status is not None:
        return f"HTTP {status}" + (f" {code}" if code and code != str(status) else "")
    number = getattr(error, "errno", None)
    return f"{type(error).__name__}: {os.strerror(number)}" if isinstance(number, int) else type(error).__name__


def _without_secrets(url: str) -> str:
    # Not urlsplit: it takes a chain of addresses (`simplecache::s3://…`) for one without a host.
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0]).rstrip("/")


def _remove(folder: Path, pid: int) -> None:
    # A forked child inherits the finalizer but not the folder.
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
