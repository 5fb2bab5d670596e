"""Settings in a checkpoint, with limits: a file of one kilobyte can hold values that take hours to print or compare."""

from torch import Tensor

_MAX_VALUES = 10_000  # in all nested lists and dictionaries of a value together
_MAX_DEPTH = 20
_MAX_TEXT = 2**21  # characters; mmdetection saves a whole configuration as one text
_MAX_INTEGER = 2**63


class Unreadable:
    """Placeholder for a value that is not read. It equals no other value, and messages show its description."""

    def __init__(self, description: str):
        self.description = description

    def __repr__(self) -> str:
        return self.description


def plain_value(value):
    """The value if it consists of a limited number of numbers, texts, lists and dictionaries, else an `Unreadable`."""
    budget = [_MAX_VALUES]
    try:
        return _plain(value, budget, _MAX_DEPTH)
    except OverflowError:
        return Unreadable(f"a {type(value).__name__} that is too large or too deep to be a setting")


def _plain(value, budget: list[int], depth: int):
    """Copy a value. An object that occurs twice counts twice.

    Args:
        budget: number of values that may still be copied, in a list of length 1.
    Raises:
        OverflowError: the value is too large or too deep.
    """
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        raise OverflowError
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if abs(value) >= _MAX_INTEGER:
            raise OverflowError
        return value
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            raise OverflowError
        return value
    if isinstance(value, list | tuple):
        return (
            type(value)([_plain(item, budget, depth - 1) for item in value]) if type(value) in (list, tuple) else None
        )
    if isinstance(value, dict):
        return {_plain(key, budget, 0): _plain(item, budget, depth - 1) for key, item in dict.items(value)}
    return Unreadable("a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}")
