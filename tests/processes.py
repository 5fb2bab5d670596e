"""Several processes on this machine, as `torchrun` starts them: gloo on the CPU, one thread each."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")


def leave() -> NoReturn:
    """The end of a script that several processes run, after all that it checks.

    torch sometimes aborts the interpreter while that shuts down ("terminate called without an active exception", SIGABRT): one
    process in 50 on a busy machine, in which nothing of Python runs any more. A test of something else must not fail by it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def exit_code_of_fork(function: Callable[[], object]) -> int:
    """What a copy of this process ends with that calls a function: 0, 1 if that raises, -9 if it is killed.

    Tests that lead here have the mark `needs_fork`.
    """
    return exit_codes_of_forks([function])[0]


def exit_codes_of_forks(functions: Sequence[Callable[[], object]]) -> list[int]:
    """As `exit_code_of_fork`, for functions that run at the same time."""
    processes = [_fork(function) for function in functions]
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def _fork(function: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return process


def environment_of_scripts(gpu: bool = False) -> dict[str, str]:
    tests = Path(__file__).parent
    folders = map(str, (tests, tests / "parity", tests.parent / "benchmarks"))
    paths = [*folders, os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return os.environ | settings | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})


def run_processes(script: str, num_processes: int, *arguments, timeout: float = 240, gpu: bool = False) -> None:
    """Run `tests/scripts/<script>.py` in each of `num_processes` processes; fail with what they printed if one does."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    try:
        subprocess.run(
            [*launch, str(SCRIPTS / f"{script}.py"), *map(str, arguments)],
            env=environment_of_scripts(gpu),
            check=True,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        # What failed first: reports are often cut off at their end.
        pytest.fail(f"{script} on {num_processes} processes:\n{error.stderr[-6000:]}\n{error.stdout[-2000:]}")
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{script} on {num_processes} processes hung:\n{error.stdout}\n{error.stderr}")
