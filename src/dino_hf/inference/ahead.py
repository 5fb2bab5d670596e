"""Process items in threads before their results are requested."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

_THREADS = min(8, os.cpu_count() or 1)


def map_ahead(
    function: Callable,
    items: Iterable,
    num_threads: int = _THREADS,
    *,
    cost: Callable[[object], float] | None = None,
    budget: float = math.inf,
) -> Iterator[tuple]:
    """Yield each item with its result, in order. The caller's thread reads `items`, at most `num_threads` items ahead.

    Args:
        cost: cost of an item, in the unit of `budget`, such as bytes.
        budget: limit for the total cost of the items in progress. An item that costs more is processed alone.
    """
    pool, pending = ThreadPoolExecutor(num_threads), deque()
    try:
        for item in items:
            price = 0 if cost is None else cost(item)
            while pending and (len(pending) > num_threads or sum(entry[2] for entry in pending) + price > budget):
                yield _finish(pending)
            pending.append((item, pool.submit(function, item), price))
            del item
            # Finish before the next item is read, because reading an item, such as decoding an image, may need the memory.
            while pending and (len(pending) > num_threads or sum(entry[2] for entry in pending) > budget):
                yield _finish(pending)
        while pending:
            yield _finish(pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(pending: deque) -> tuple:
    item, future, _ = pending.popleft()
    return item, future.result()
