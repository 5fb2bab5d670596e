"""Messages of a conversion. They are printed, or collected for a record."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_COLLECTED: ContextVar[list[str] | None] = ContextVar("collected messages of conversions", default=None)


def say(*lines: str, sep: str = " ") -> None:
    """Print lines like `print`. Inside `collect_messages`, add them to its list instead."""
    collected = _COLLECTED.get()
    if collected is None:
        print(*lines, sep=sep)
    else:
        collected.append(sep.join(lines))


@contextmanager
def collect_messages() -> Iterator[list[str]]:
    """Yield a list that gets the messages of this thread instead of standard output."""
    collected: list[str] = []
    token = _COLLECTED.set(collected)
    try:
        yield collected
    finally:
        _COLLECTED.reset(token)
