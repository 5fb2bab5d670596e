"""Check a pickle without executing it: reading a forged pickle may take hours or all memory."""

import pickletools
from typing import IO, NamedTuple

_MAX_HASHED = 10**6  # values visited to hash one dictionary key
_MAX_BYTES = 2**26  # of a pickle, without the numbers of tensors; large trainings need less than 1 MiB
_MAX_OPERATIONS = 2**21  # of a pickle: checking them takes seconds; a tensor needs about 20
MAX_TENSORS = 80_000  # of a file, with averages and the state of an optimizer


class TooLarge(ValueError):
    """Reading a pickle would take too much time or memory."""


class PickleContent(NamedTuple):
    """Content of a pickle, known from its operations without executing them."""

    storages: dict[str, int]  # key of a storage of tensors -> how many numbers it has
    texts: set[str]


class _Bounded:
    """A stream that yields a limited number of bytes, because one operation of a pickle can ask for gigabytes."""

    def __init__(self, stream: IO[bytes], limit: int):
        self.stream, self.left, self.limit = stream, limit, limit

    def _spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise TooLarge(f"it has more than {self.limit:,} bytes besides its tensors")

    def read(self, size: int) -> bytes:
        self._spend(size)
        return self.stream.read(size)

    def readline(self) -> bytes:
        line = self.stream.readline(self.left + 1)
        self._spend(len(line))
        return line


def check_pickle(stream: IO[bytes]) -> PickleContent:
    """Check the operations of a pickle without executing them.

    Args:
        stream: at the beginning of a pickle; afterwards at its end.
    Raises:
        TooLarge: the pickle is too large, has too many tensors, or has nested tuples whose hash takes too long.
        ValueError: the pickle is damaged.
    """
    stack, marks, memo = [], [], {}  # for each object, how many values its hash visits, and its value if it is plain
    content, num_tensors = PickleContent({}, set()), 0
    operations = pickletools.genops(_Bounded(stream, _MAX_BYTES))
    for count, (operation, argument, _) in enumerate(operations):
        if count >= _MAX_OPERATIONS:
            raise TooLarge(f"it has more than {_MAX_OPERATIONS:,} values besides its tensors")
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
            start, taken = _operands(operation, stack, marks)
            if name == "BINPERSID":
                num_tensors += 1
                _add_storage(content.storages, taken[0][1])
                if num_tensors > MAX_TENSORS:
                    raise TooLarge(
                        f"it has more than {MAX_TENSORS:,} tensors, and a training of DINO has fewer than 10,000"
                    )
            if isinstance(argument, str) and name in _TEXTS:
                content.texts.add(argument)
            before = operation.stack_before
            filled = stack[start] if before and before[0] in _FILLED and name in _FILLING else None
            del stack[start:]
            cost = 1 + sum(cost for cost, _ in taken) if name in _HASHED else 1
            if cost > _MAX_HASHED:
                raise TooLarge("it has nested tuples that stand for more values than any training saves")
            if name in _TUPLES:
                argument = tuple(value for _, value in taken) if len(taken) <= _STORAGE_VALUES else None
            stack.extend([(cost, argument) if filled is None else filled] * len(operation.stack_after))
    return content


def _operands(operation: pickletools.OpcodeInfo, stack: list, marks: list[int]) -> tuple[int, list]:
    """The operands of an operation, and their position on the stack."""
    before = operation.stack_before
    if pickletools.markobject in before:
        mark = marks.pop()
        start, taken = mark - before.index(pickletools.markobject), stack[mark:]
    else:
        start = len(stack) - len(before)
        taken = stack[max(0, start) :]
    if start < 0:
        raise ValueError("its operations take values that are not there")
    return start, taken


def _add_storage(storages: dict[str, int], entry) -> None:
    """Add the entry of a storage: ("storage", its class, its key, its device, how many numbers it has, ...)."""
    plain = isinstance(entry, tuple) and len(entry) >= 5
    if not plain or not isinstance(entry[2], str) or isinstance(entry[4], bool) or not isinstance(entry[4], int):
        raise ValueError("the entry of a tensor has a form that torch does not write")
    if entry[4] < 0 or storages.setdefault(entry[2], entry[4]) != entry[4]:
        raise ValueError(f"the numbers of tensors {entry[2][:50]!r} have two sizes")


_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_STORAGE_VALUES = 6  # values of the entry of a storage
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING")
_HASHED = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ")
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_FILLED = (pickletools.pylist, pickletools.pydict, pickletools.pyset, pickletools.anyobject)
