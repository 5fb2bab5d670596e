"""Main memory that is free, also in containers."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def free_main_memory() -> int:
    """Bytes of main memory that this process may still take."""
    return min([psutil.virtual_memory().available, *_left_in_container()])


def _left_in_container() -> list[int]:
    """Of the limit that a container has, where there is one (cgroup v2). Pages of files, which the system gives up, are free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" is no number: no limit
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, limit - used + int(statistics.get("inactive_file", 0)))]
