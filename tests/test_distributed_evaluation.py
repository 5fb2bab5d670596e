"""The stock `Trainer` on 1, 2 and 3 processes gives what pycocotools gives; the checks are in scripts/evaluation.py."""

import json

import pytest

from dino_hf.common.scenes import make_scenes
from processes import run_processes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """12 images of different size, with crowds, classes that some images lack, and three images without any object."""
    path = make_scenes(tmp_path_factory.mktemp("scenes") / "eval", 12, seed=7)
    content = json.loads(path.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in (3, 4, 10)]
    assert any(entry["iscrowd"] for entry in content["annotations"])
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_numbers_are_those_of_pycocotools(scenes, tmp_path, num_processes):
    run_processes("evaluation", num_processes, scenes, tmp_path)
