"""Loading ahead of time, in threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Request = TypeVar("Request")
Loaded = TypeVar("Loaded")


def prefetch(
    requests: Iterable[Request], load: Callable[[Request], Loaded], num_workers: int
) -> Generator[Loaded, None, None]:
    """Load requests in their order, up to `2 * num_workers` ahead in threads (0: when asked for).

    Threads are enough: reading, decompressing and copying release the interpreter lock. An error in a thread is raised
    where its result is asked for, so that a bad clip ends the run by name and never hangs it.
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
            loaded = pending.popleft().result()
            for request in itertools.islice(upcoming, 1):
                pending.append(pool.submit(load, request))
            yield loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
