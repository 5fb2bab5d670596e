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
_PAUSE = 0.2  # seconds: enough to write a lock, and for two processes that take over one stale lock to see each other
_SAME_START = 1.0  # seconds by which two readings of the start of one process may differ
_held: set[Path] = set()  # by this process


@contextmanager
def locked_run(folder: Path, is_first: bool) -> Iterator[None]:
    """Hold the lock of a run's folder, and make the folder if it is missing. Inside, taking the lock again does nothing.

    The lock of a process that has ended is taken over. Processes of another machine cannot be seen, so their locks stand.

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
        with suppress(OSError):  # not empty: it holds a run now
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
    if holder is None:
        time.sleep(_PAUSE)  # another process may be writing it
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
    """The content of a lock. None: there is no lock, or it is damaged, because a process was killed while it wrote the lock."""
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
        return abs(started - float(holder["started"])) <= _SAME_START  # process numbers are used again
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False
