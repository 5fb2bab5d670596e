"""Lock of a run's folder, so that only one process trains in it. The lock file names the machine and process that hold it."""

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from ..common.output_folders import machine_mark, scratch_folder
from ..common.regular_files import open_regular, read_bytes, read_settings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = "_run.lock"  # uploads skip names that begin with an underscore
_PAUSE = 0.2  # seconds; long enough to write a lock on a file system without hard links
_SAME_START = 1.0  # seconds by which two readings of the start time of one process may differ
_held: set[Path] = set()  # locks of this process


@contextmanager
def locked_run(folder: Path, is_first: bool) -> Iterator[None]:
    """Hold the lock of a run's folder, and make the folder if it is missing. Inside, taking the lock again does nothing.

    The lock of a process that has ended is replaced. Processes of another machine cannot be seen, so their locks stay.

    Args:
        is_first: whether this is the first process of the run. The other processes need no lock.
    Raises:
        ValueError: another process trains in this folder.
    """
    path = folder.resolve() / LOCK_NAME
    if not is_first or path in _held:
        yield
        return
    new = [place for place in path.parents if not place.exists()]  # the deepest one first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(path):
            _held.add(path)
            try:
                yield
            finally:
                _held.discard(path)
    finally:
        with suppress(OSError):  # not empty: it holds a run now
            for place in new:
                place.rmdir()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    mine = {
        "host": socket.gethostname(),
        "machine": machine_mark(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "token": secrets.token_hex(8),
    }
    file = _take(path, mine)
    try:
        yield
    finally:
        if _read(path) == mine:
            path.unlink(missing_ok=True)
        file.close()


def _take(path: Path, mine: dict) -> BinaryIO:
    """Create the lock file. It never exists without its content.

    Returns:
        the lock file. While it is open, other containers of this machine see that its process runs.
    """
    # The name of the scratch folder has the token, because threads of a process share its number.
    with scratch_folder(path.with_name(f"_run-{mine['token']}.lock")) as scratch:
        unfinished = scratch / LOCK_NAME
        file = _write(unfinished, mine)
        try:
            while not _link(unfinished, path):
                if _replace_ended(path, unfinished):
                    break
        except BaseException:
            file.close()
            raise
    return file


def _write(path: Path, content: dict) -> BinaryIO:
    file = path.open("xb")
    file.write(json.dumps(content).encode())
    file.flush()
    if fcntl is None:
        file.close()  # Windows cannot rename open files
    else:
        with suppress(OSError):  # some file systems do not support these locks
            # Unlike flock, workers that may outlive this process do not inherit this lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _link(unfinished: Path, path: Path) -> bool:
    """Give a file its final name in one step. False: the name is taken."""
    try:
        try:
            os.link(unfinished, path)
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links
            path.touch(exist_ok=False)
            os.replace(unfinished, path)
    except FileExistsError:
        return False
    return True


def _replace_ended(path: Path, unfinished: Path) -> bool:
    """Replace a lock whose process has ended. False: another process was faster, so try again.

    A second lock protects this step. Its name depends on the replaced content. If two processes see the same ended lock, the slower
    process then finds other content, and does not replace the lock of the faster process.

    Raises:
        ValueError: a running process holds the lock.
    """
    ended = _content(path)
    holder = _read(path)
    if holder is None:
        time.sleep(_PAUSE)  # without hard links, another process may be writing it
        ended, holder = _content(path), _read(path)
    if not os.path.lexists(path):
        return False
    if holder is not None and _is_running(holder, path):
        raise _refusal(path, holder)
    with _lock(path.with_name(f"{path.name}.{hashlib.sha256(ended or b'').hexdigest()[:16]}")):
        if _content(path) != ended:
            return False
        os.replace(unfinished, path)
        return True


def _refusal(path: Path, holder: dict) -> ValueError:
    return ValueError(
        f"Process {holder.get('pid')} on {holder.get('host')} trains in {path.parent}. Choose another --output-dir, or wait. If "
        f"this process has ended, delete {path}."
    )


def _content(path: Path) -> bytes | None:
    """Bytes of a lock. None: there is no lock, or it cannot be read."""
    try:
        return read_bytes(path)
    except (OSError, ValueError):
        return None


def _read(path: Path) -> dict | None:
    """Content of a lock. None: there is no lock, or it is damaged because its process was killed while writing it."""
    try:
        content = read_settings(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_running(holder: dict, path: Path) -> bool:
    if holder.get("host") != socket.gethostname():
        return True
    if holder.get("machine", machine_mark()) != machine_mark():
        # Another container, another machine with this name, or this machine before a restart: process numbers are not comparable.
        return _is_open(path)
    try:
        started = psutil.Process(int(holder["pid"])).create_time()
        return abs(started - float(holder["started"])) <= _SAME_START  # process numbers are reused
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _is_open(path: Path) -> bool:
    """Whether a process still holds a lock file open. True if the file system does not support locks."""
    if fcntl is None:
        return True
    try:
        with open_regular(path) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: several may look at the same time
    except OSError:
        return True
    return False
