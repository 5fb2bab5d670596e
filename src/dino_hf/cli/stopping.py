"""Make SIGTERM and SIGHUP act like Ctrl-C, so that a command cleans up before it ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. Code that handles Ctrl-C handles it too, so `finally` blocks run."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name} arrived")
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code by the convention of shells: 128 plus the number of the signal."""
        return 128 + self.number


@contextmanager
def stop_like_ctrl_c() -> Iterator[None]:
    """Inside the context, SIGTERM and SIGHUP raise `Terminated` in the main thread. A second signal ends the process at once.

    In other threads it does nothing, because they cannot set handlers. Existing handlers are kept.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked worker: its parent cleans up
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
