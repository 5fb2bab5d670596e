"""Parameters spread over processes. On CPUs torch can, accelerate cannot: it takes DDP there."""

import pytest
import torch
from transformers import AutoModelForObjectDetection

from processes import run_processes


@pytest.mark.slow
def test_a_step_of_a_sharded_model_is_that_of_the_plain_one_and_it_can_be_saved(tmp_path):
    run_processes("fsdp", 2, tmp_path / "model")
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "model").config.num_labels == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_trainer_trains_and_saves_a_sharded_model(tmp_path):
    run_processes("fsdp_trainer", torch.cuda.device_count(), tmp_path, gpu=True)
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "model").config.num_labels == 5
