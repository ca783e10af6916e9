"""Work ahead of time, in threads."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Request = TypeVar("Request")
Loaded = TypeVar("Loaded")

_POLL_SECONDS = 0.1
_END = object()


def prefetch(
    requests: Iterable[Request],
    load: Callable[[Request], Loaded],
    num_workers: int,
    discard: Callable[[Loaded], None] = lambda loaded: None,
) -> Generator[Loaded, None, None]:
    """Load requests in their order, up to `2 * num_workers` ahead in threads (0: when asked for).

    Threads are enough: reading, decompressing and copying release the interpreter lock. An error in a thread is raised
    where its result is asked for, so that a bad clip ends the run by name and never hangs it. What was loaded and is
    not asked for any more goes to `discard`.
    """
    if num_workers == 0:
        yield from map(load, requests)
        return
    pending: deque[Future[Loaded]] = deque()
    upcoming = iter(requests)
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader")
    try:
        for request in itertools.islice(upcoming, 2 * num_workers):
            pending.append(pool.submit(load, request))
        while pending:
            first = pending[0].result()
            for request in itertools.islice(upcoming, 1):
                pending.append(pool.submit(load, request))
            pending.popleft()
            yield first
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for future in pending:
            # The failure of a request that nobody asks for any more is nobody's.
            if not future.cancelled() and future.exception() is None:
                discard(future.result())


def background(
    items: Iterable[Item], depth: int, discard: Callable[[Item], None] = lambda item: None
) -> Generator[Item, None, None]:
    """Iterate in a thread of its own, up to `depth` items ahead; an error is raised where the item is asked for."""
    ready: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
    leaving = threading.Event()

    def put(entry: tuple[bool, Item | BaseException | None]) -> bool:
        while not leaving.is_set():
            try:
                ready.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    discard(item)
                    break
        except BaseException as error:
            put((False, error))
        else:
            put((False, None))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=run, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_item, entry = ready.get()
            if not is_item:
                if isinstance(entry, BaseException):
                    raise entry
                return
            yield entry  # type: ignore[misc]
    finally:
        leaving.set()
        thread.join()
        while not ready.empty():
            is_item, entry = ready.get()
            if is_item:
                discard(entry)  # type: ignore[arg-type]


def look_ahead(requests: Iterator[Request], depth: int, act: Callable[[Request], None]) -> Iterator[Request]:
    """Pass requests on, each after `act` has seen those up to `depth` further on."""
    upcoming: deque[Request] = deque()
    for request in requests:
        act(request)
        upcoming.append(request)
        if len(upcoming) > depth:
            yield upcoming.popleft()
    yield from upcoming


def for_two_threads(items: Iterable[Item]) -> tuple[Iterator[Item], Iterator[Item]]:
    """Let two threads iterate over the same items, each at its own pace."""
    lock = threading.Lock()

    def locked(branch: Iterator[Item]) -> Iterator[Item]:
        while True:
            # A tee's branches share their source, and none may be asked while the other one asks.
            with lock:
                item = next(branch, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    one, other = itertools.tee(items)
    return locked(one), locked(other)
