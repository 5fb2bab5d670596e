"""A run that is killed at any moment and resumed ends with what one that was not killed ends with, bit by bit; and the same seed
gives the same run. The runs are those of scripts/kill_run.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_hf.common.scenes import make_scenes
from processes import needs_fork

pytestmark = [pytest.mark.slow, needs_fork]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run -> what it ended with."""
    folder = tmp_path_factory.mktemp("runs")
    make_scenes(folder / "data/train", 11, seed=0)
    make_scenes(folder / "data/eval", 5, seed=1)
    here = Path(__file__).parent
    log = folder / "log.txt"
    with log.open("w") as stream:  # a pipe would stay open as long as workers of a run that was killed
        status = subprocess.run(
            [sys.executable, str(here / "scripts/kill_run.py"), str(folder / "data"), str(folder)],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=stream,
            stderr=stream,
            timeout=400,
        ).returncode
    if status:
        pytest.fail(f"kill_run.py ended with {status}:\n{log.read_text()[-6000:]}")
    return {
        name: torch.load(folder / name / "result.pt", weights_only=True)
        for name in ("whole", "killed", "workers", "determined", "again")
    }


def differences(first, second, where="") -> list[str]:
    """Places where two nested results differ; tensors by any bit."""
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        if set(first) != set(second):
            return [f"{where}: {set(first) ^ set(second)}"]
        return [line for name in first for line in differences(first[name], second[name], f"{where}.{name}")]
    elif isinstance(first, list):
        if len(first) != len(second):
            return [f"{where}: {len(first)} and {len(second)} entries"]
        pairs = enumerate(zip(first, second, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{where}.{index}")]
    else:
        same = first == second
    return [] if same else [where]


def test_a_run_that_was_killed_eight_times_is_the_same_run(results):
    assert differences(results["killed"], results["whole"]) == []
    assert results["whole"]["num_updates"] == 9
    assert results["whole"]["checkpoints"] == ["checkpoint-8", "checkpoint-9"]
    losses = [entry["loss"] for entry in results["whole"]["log"] if "loss" in entry]
    assert len(set(losses)) == 9


def test_workers_that_prepare_images_change_nothing(results):
    assert differences(results["workers"], results["whole"]) == []


def test_full_determinism_repeats_a_run(results):
    assert differences(results["determined"], results["again"]) == []


def test_the_comparison_sees_a_single_bit(results):
    one, other = (dict(results[name]["average"]) for name in ("whole", "killed"))
    name = "model.encoder.layers.0.mlp.fc1.weight"
    value = other[name] = other[name].clone()
    value[0, 0] = torch.nextafter(value[0, 0], torch.tensor(9.0))
    assert differences({"average": one}, {"average": other}) == [f".average.{name}"]
