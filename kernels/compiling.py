"""Runs compilers as the children of a small process that ends them when their starter dies, however it dies.

    python -I compiling.py SECONDS FOLDER < commands.json

It starts all commands of the first line of its input at once and prints what became of them, as JSON. When its input ends (the
starter closes it, or is gone), or after SECONDS, it kills the compilers with all that they have started. If the starter is gone,
it also deletes FOLDER. It uses the standard library only: importing torch would take longer than to compile.
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
    """Run commands side by side, outside of this process's group.

    Args:
        seconds: limit for all of them together.
        scratch: folder that is deleted if this process dies meanwhile.
    Returns:
        for each command `code` (negative: killed by this signal; None: it was still running after `seconds`) and `output`, both
        streams as text, whatever their encoding.
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
            # A process that was forked meanwhile may hold the input open: the parent tells, too.
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
    while os.read(0, 1000):  # not the buffered stream: at its end Python would wait for the thread that holds it
        pass
    abandoned.set()


def _kill(process: subprocess.Popen) -> None:
    """A process that still runs and, where there are groups, all that it has started."""
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
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal is gone: so is the starter, which is noticed anyway
    commands = json.loads(sys.stdin.buffer.readline() or "[]")
    sys.stdout.write(json.dumps(_supervise(commands, float(sys.argv[1]), sys.argv[2])))


if __name__ == "__main__":
    _main()
