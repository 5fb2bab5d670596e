"""A command that is told to end cleans up first, and what a killed one left is removed by the next."""

import hashlib
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_SUFFIX = "partial"


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. It is handled wherever Ctrl-C is, so `finally` blocks run."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name} arrived")
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells count: 128 and the number of the signal."""
        return 128 + self.number


@contextmanager
def stop_like_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise `Terminated` in the main thread. A second one ends the process at once.

    Does nothing in other threads, which cannot set handlers, and leaves handlers alone that somebody else has set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a worker that was forked: it has nothing to clean up
            os.kill(os.getpid(), number)
            return
        raise Terminated(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def scratch_path(target: Path) -> Path:
    """Where a file or folder is written before it takes the name `target`: hidden, beside it, named after this process."""
    return target.with_name(f".{target.name}.{_machine()}-{os.getpid()}.{_SUFFIX}")


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A new folder at `scratch_path(target)`, which is removed at the end with all that is in it. Leftovers of `target` go first.

    Raises:
        OSError: it cannot be made.
    """
    remove_leftovers(target)
    folder = scratch_path(target)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(target: Path) -> list[Path]:
    """Remove the scratch beside `target` of processes of this machine that are dead. Gives what was removed."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_machine()}-(\d+)\.{_SUFFIX}")
    removed = []
    with suppress(OSError):  # nobody may list the folder, or there is none: then nothing can be left in it by us
        for path in target.parent.iterdir():
            found = pattern.fullmatch(path.name)
            if found is None or int(found[1]) == os.getpid() or psutil.pid_exists(int(found[1])):
                continue
            _remove(path)
            if not os.path.lexists(path):
                removed.append(path)
    return removed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _machine() -> str:
    """Names what a process id is unique in: the host, and on Linux the container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]
