"""One process at a time trains in a folder: a lock file with the host and the process that hold it."""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ..common.regular_files import read_settings

LOCK_NAME = "_run.lock"  # uploads leave out what begins with an underscore
_PAUSE = 0.2  # seconds in which two processes that found the same stale lock see each other
_SAME_START = 1.0  # seconds by which two readings of the start of one process may differ
_held: set[Path] = set()  # by this process


@contextmanager
def locked_run(folder: Path, is_first: bool) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if it is missing. Within this context, taking it again does nothing.

    The lock of a process that has ended is taken over. On another machine that cannot be seen, so its lock stands.

    Args:
        is_first: this is the first process of the run; the others need no lock.
    Raises:
        ValueError: another process trains in this folder.
    """
    path = folder.resolve() / LOCK_NAME
    if not is_first or path in _held:
        yield
        return
    new = [place for place in path.parents if not place.exists()]  # the deepest one first
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = _take(path)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        if _read(path) == mine:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # there is a run in it now
            for place in new:
                place.rmdir()


def _take(path: Path) -> dict:
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "token": secrets.token_hex(8),
    }
    text = json.dumps(mine)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        return mine
    except FileExistsError:
        holder = _read(path)
    if holder is not None and _is_running(holder):
        raise _refusal(path, holder)
    unfinished = path.with_name(f"{LOCK_NAME}.{mine['token']}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    time.sleep(_PAUSE)
    if (holder := _read(path)) != mine:
        raise _refusal(path, holder or {})
    return mine


def _refusal(path: Path, holder: dict) -> ValueError:
    return ValueError(
        f"Process {holder.get('pid')} on {holder.get('host')} trains in {path.parent}: choose another --output-dir, or wait. If "
        f"that process has ended, delete {path}."
    )


def _read(path: Path) -> dict | None:
    """None: there is no lock, or a damaged one, which a process left that was killed while it wrote it."""
    try:
        content = read_settings(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_running(holder: dict) -> bool:
    if holder.get("host") != socket.gethostname():
        return True
    try:
        started = psutil.Process(int(holder["pid"])).create_time()
        return abs(started - float(holder["started"])) <= _SAME_START  # numbers of processes come again
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False
