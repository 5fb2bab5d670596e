"""Several processes on this machine, as `torchrun` starts them: gloo on the CPU, one thread each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


def environment_of_scripts(gpu: bool = False) -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent / "parity"), os.environ.get("PYTHONPATH", "")]
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
        pytest.fail(f"{script} on {num_processes} processes:\n{error.stdout[-4000:]}\n{error.stderr[-8000:]}")
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{script} on {num_processes} processes hung:\n{error.stdout}\n{error.stderr}")
