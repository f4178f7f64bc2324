"""Work in threads, in order: NumPy and reading from disk release the interpreter while they run."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

# More threads would hold more items in memory, and wait for the caller, who makes the items.
MOST = 8


def in_threads(function: Callable[[S], T], items: Iterable[S], threads: int | None = None) -> Generator[T, None, None]:
    """`map(function, items)` in so many threads (default: one for each core, at most `MOST`). Results come in the order
    of the items, which advance in the caller's thread, no further ahead than there are threads."""
    threads = min(os.cpu_count() or 1, MOST) if threads is None else threads
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
