"""Limits for values in a checkpoint besides tensors. A file of one kilobyte can hold values that take hours to print or compare."""

import pickletools
from typing import IO, NamedTuple

from torch import Tensor

_MOST_VALUES = 10_000  # in all nested lists and dictionaries of a value together
_DEEPEST = 20
_LONGEST_TEXT = 2**21  # characters; mmdetection saves a whole configuration as one text
_LARGEST_INTEGER = 2**63
_MOST_HASHED = 10**6  # values visited to hash one dictionary key
_LARGEST_PICKLE = 2**26  # bytes of values beside the tensors of a checkpoint; large trainings need less than 1 MiB
_MOST_OPERATIONS = 2**21  # of a pickle: looking at them takes seconds; a tensor needs about 20
MOST_PARTS = 80_000  # tensors of a file, with averages and the state of an optimizer


class Unreadable:
    """Placeholder for a value that is not read. It equals no other value, and messages show its description."""

    def __init__(self, what: str):
        self.what = what

    def __repr__(self) -> str:
        return self.what


def plain_value(value):
    """The value if it consists of a limited number of numbers, texts, lists and dictionaries, else an `Unreadable`."""
    budget = [_MOST_VALUES]
    try:
        return _plain(value, budget, _DEEPEST)
    except OverflowError:
        return Unreadable(f"a {type(value).__name__} that is too large or too deep to be a setting")


def _plain(value, budget: list[int], depth: int):
    """Copy a value. Raises OverflowError beyond the budget. An object that occurs twice counts twice."""
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        raise OverflowError
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if abs(value) >= _LARGEST_INTEGER:
            raise OverflowError
        return value
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise OverflowError
        return value
    if isinstance(value, list | tuple):
        return type(value)([_plain(one, budget, depth - 1) for one in value]) if type(value) in (list, tuple) else None
    if isinstance(value, dict):
        return {_plain(key, budget, 0): _plain(one, budget, depth - 1) for key, one in dict.items(value)}
    return Unreadable("a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}")


class TooLarge(ValueError):
    """Reading a pickle would take too much time or memory."""


class _Bounded:
    """A stream that yields a limited number of bytes, because one operation of a pickle can ask for gigabytes."""

    def __init__(self, stream: IO[bytes], most: int):
        self.stream, self.left, self.most = stream, most, most

    def _spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise TooLarge(f"it has more than {self.most:,} bytes besides its tensors")

    def read(self, size: int) -> bytes:
        self._spend(size)
        return self.stream.read(size)

    def readline(self) -> bytes:
        line = self.stream.readline(self.left + 1)
        self._spend(len(line))
        return line


class PickleContent(NamedTuple):
    """Content of a pickle, known from its operations without executing them."""

    storages: dict[str, int]  # numbers in each storage of tensors, by its key
    texts: set[str]


def check_pickle(stream: IO[bytes]) -> PickleContent:
    """Check the operations of a pickle without executing them, because reading a forged pickle may never end.

    Args:
        stream: at the beginning of a pickle; afterwards at its end.
    Raises:
        TooLarge: the pickle is too large, has too many tensors, or has nested tuples whose hash takes too long.
        ValueError: the pickle is damaged.
    """
    stack, marks, memo = [], [], {}  # for each object, how many values its hash visits, and its value if it is plain
    content, num_tensors = PickleContent({}, set()), 0
    operations = pickletools.genops(_Bounded(stream, _LARGEST_PICKLE))
    for count, (operation, argument, _) in enumerate(operations):
        if count >= _MOST_OPERATIONS:
            raise TooLarge(f"it has more than {_MOST_OPERATIONS:,} values besides its tensors")
        name = operation.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP_MARK":
            del stack[marks.pop() :]
        else:
            before = operation.stack_before
            if pickletools.markobject in before:
                mark = marks.pop()
                taken = stack[mark:]
                start = mark - before.index(pickletools.markobject)
            else:
                start = len(stack) - len(before)
                taken = stack[max(0, start) :]
            if start < 0:
                raise ValueError("its operations take values that are not there")
            if name == "BINPERSID":
                num_tensors += 1
                _add_storage(content.storages, taken[0][1])
                if num_tensors > MOST_PARTS:
                    raise TooLarge(
                        f"it has more than {MOST_PARTS:,} tensors, and a training of DINO has fewer than 10,000"
                    )
            if isinstance(argument, str) and name in _TEXTS:
                content.texts.add(argument)
            target = stack[start] if before and before[0] in _FILLED and name in _FILLING else None
            del stack[start:]
            cost = 1 + sum(cost for cost, _ in taken) if name in _HASHED else 1
            if cost > _MOST_HASHED:
                raise TooLarge("it has nested tuples that stand for more values than any training saves")
            if name in _TUPLES:
                argument = tuple(value for _, value in taken) if len(taken) <= _LONGEST_STORAGE else None
            stack.extend([(cost, argument) if target is None else target] * len(operation.stack_after))
    return content


def _add_storage(storages: dict[str, int], entry) -> None:
    """Take over the entry of a storage: ("storage", its class, its key, its device, how many numbers it has, ...)."""
    plain = isinstance(entry, tuple) and len(entry) >= 5
    if not plain or not isinstance(entry[2], str) or isinstance(entry[4], bool) or not isinstance(entry[4], int):
        raise ValueError("a tensor names its numbers in a way that torch does not write")
    if entry[4] < 0 or storages.setdefault(entry[2], entry[4]) != entry[4]:
        raise ValueError(f"the numbers of tensors {entry[2][:50]!r} have two sizes")


_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_LONGEST_STORAGE = 6  # values of the entry of a storage
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING")
_HASHED = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ")
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_FILLED = (pickletools.pylist, pickletools.pydict, pickletools.pyset, pickletools.anyobject)
