"""The same batch on one process and on two."""

import pytest
import torch
from recipe import make_checkpoint

from dino_hf.conversion.convert_checkpoint import convert
from processes import run_processes


@pytest.mark.slow
@pytest.mark.xdist_group("parity")
def test_losses_and_gradients_on_two_processes_are_those_of_one_and_the_recorded_ones(tmp_path):
    variant = "original/r50_4scale"
    torch.save(make_checkpoint(variant), tmp_path / "checkpoint.pth")
    convert(tmp_path / "checkpoint.pth", tmp_path / "converted")
    run_processes("data_parallel", 2, variant, tmp_path / "converted")
