"""Every test draws the same random numbers, alone or in any order; without a C++ compiler, attention is PyTorch's."""

import os

import pytest
import torch

from dino_hf.model.attention_backends import ENVIRONMENT_VARIABLE
from helpers import HAS_COMPILER

if not HAS_COMPILER:
    os.environ.setdefault(ENVIRONMENT_VARIABLE, "torch")  # chosen, so that no test sees the warning of the fallback


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
