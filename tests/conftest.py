"""Every test draws the same random numbers, alone or in any order; without a C++ compiler, attention is PyTorch's.

Tests that fork run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from dino_hf.model.attention_backends import ENVIRONMENT_VARIABLE
from helpers import HAS_COMPILER

if not HAS_COMPILER:
    os.environ.setdefault(ENVIRONMENT_VARIABLE, "torch")  # chosen, so that no test sees the warning of the fallback


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


_IS_ALONE = "DINO_HF_TEST_IS_ALONE"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test with the mark `forks` in a new process, which has one thread.

    A fork of a process with more threads may hang: libraries lock their own state while they fork.
    """
    if pyfuncitem.get_closest_marker("forks") is None or _IS_ALONE in os.environ:
        return None
    name = pyfuncitem.nodeid.partition("@")[0]  # pytest-xdist appends the group
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    alone = os.environ | {_IS_ALONE: "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=alone, timeout=240, capture_output=True, text=True
    )
    if done.returncode or "1 passed" not in done.stdout:
        pytest.fail(f"{name} in a process of its own:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
    return True
