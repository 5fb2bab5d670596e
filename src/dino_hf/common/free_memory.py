"""Free main memory, also in containers."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
# What torch, C++, oneDNN and ONNX Runtime call it, on CPUs and GPUs.
_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "can't start new thread")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was missing. Libraries say so in errors of several types."""
    is_told = isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
    return is_told or isinstance(error, MemoryError)


def free_main_memory() -> int:
    """Bytes of main memory that this process can still allocate."""
    return min([psutil.virtual_memory().available, *_left_in_container()])


def _left_in_container() -> list[int]:
    """Bytes left below the limit of a container (cgroup v2), if there is one. Cached file pages count as free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" is no number: no limit
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, limit - used + int(statistics.get("inactive_file", 0)))]
