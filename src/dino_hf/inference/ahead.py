"""Work done by threads before its result is asked for."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

_THREADS = min(8, os.cpu_count() or 1)


def map_ahead(function: Callable, items: Iterable, num_threads: int = _THREADS) -> Iterator[tuple]:
    """Each item with its result, in order. `items` is read by the caller's thread, as many items ahead as there are threads."""
    pool, pending = ThreadPoolExecutor(num_threads), deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > num_threads:
                item, future = pending.popleft()
                yield item, future.result()
        for item, future in pending:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
