"""Runs compilers as children of a small process, which ends them if the process that started it dies.

    python -I compiling.py SECONDS FOLDER < commands.json

It starts all commands in the first line of its input at once, and prints their results as JSON. It kills the compilers
and their children after SECONDS, or when its input ends because the starter closed it or died. If the input ends early,
it also deletes FOLDER. It uses the standard library only: importing torch would take longer than compiling.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

LONGEST_OUTPUT = 100_000  # bytes of a compiler's messages that are kept
_HAS_GROUPS = hasattr(os, "killpg")


def run_commands(commands: list[list[str]], seconds: float, scratch: str) -> list[dict]:
    """Run commands in parallel, outside of this process's group.

    Args:
        seconds: limit for all of them together.
        scratch: folder that is deleted if this process dies meanwhile.
    Returns:
        for each command `code` (negative: killed by this signal; None: still running after `seconds`) and `output`, the
        text of both streams. Bytes that are not valid text are replaced.
    Raises:
        OSError: a command cannot be started.
    """
    supervisor = subprocess.Popen(
        [sys.executable, "-I", __file__, str(seconds), scratch],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=_HAS_GROUPS,  # Ctrl-C in a terminal reaches the starter only, which then ends the compilers
    )
    try:
        supervisor.stdin.write(json.dumps(commands).encode() + b"\n")
        supervisor.stdin.flush()
        result = json.loads(supervisor.stdout.read())
    except ValueError:
        raise OSError("the process that runs the compiler ended without a result") from None
    finally:
        with contextlib.suppress(OSError):
            supervisor.stdin.close()
        supervisor.wait()
        supervisor.stdout.close()
    if "error" in result:
        raise OSError(result["error"])
    return result["results"]


def _supervise(commands: list[list[str]], seconds: float, scratch: str) -> dict:
    starter, end, abandoned = os.getppid(), time.monotonic() + seconds, threading.Event()
    threading.Thread(target=_wait_for_end_of_input, args=(abandoned,), daemon=True).start()
    processes, outputs = [], [tempfile.TemporaryFile() for _ in commands]  # noqa: SIM115
    try:
        for command, output in zip(commands, outputs, strict=True):
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=_HAS_GROUPS,
                )
            )
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            # A process that was forked in the meantime may hold the input open, so the parent is checked as well.
            if abandoned.is_set() or os.getppid() != starter:
                abandoned.set()
                break
            time.sleep(0.02)
        codes = [process.returncode for process in processes]
    except OSError as error:
        return {"error": str(error)}
    finally:
        for process in processes:
            _kill(process)
        if abandoned.is_set():
            shutil.rmtree(scratch, ignore_errors=True)
    return {"results": [{"code": code, "output": _text(output)} for code, output in zip(codes, outputs, strict=True)]}


def _wait_for_end_of_input(abandoned: threading.Event) -> None:
    while os.read(0, 1000):  # not the buffered stream: at exit, Python would wait for the thread that holds it
        pass
    abandoned.set()


def _kill(process: subprocess.Popen) -> None:
    """Kill a process that still runs and, on systems with process groups, its children."""
    if process.returncode is not None:
        return
    with contextlib.suppress(OSError):
        if _HAS_GROUPS:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _text(output) -> str:
    output.seek(0)
    return output.read(LONGEST_OUTPUT).decode("utf-8", "replace")


def _main() -> None:
    if hasattr(signal, "SIGHUP"):
        # When the terminal closes, the starter dies, and this process notices that.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    commands = json.loads(sys.stdin.buffer.readline() or "[]")
    sys.stdout.write(json.dumps(_supervise(commands, float(sys.argv[1]), sys.argv[2])))


if __name__ == "__main__":
    _main()
