"""Free main memory, also inside containers."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
# Messages of torch, C++, oneDNN and ONNX Runtime about a lack of memory, on CPUs and GPUs.
_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "can't start new thread")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory. Libraries use several types of errors for it."""
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _TEXTS)
    return isinstance(error, MemoryError)


def free_main_memory() -> int:
    """Bytes of main memory that this process can still allocate."""
    return min([psutil.virtual_memory().available, *_left_in_container()])


def _left_in_container() -> list[int]:
    """Bytes left below the memory limit of the container (cgroup v2). Empty without a limit. Cached file pages count as free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max", which means no limit, raises ValueError
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, limit - used + int(statistics.get("inactive_file", 0)))]
