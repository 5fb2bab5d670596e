"""The drawn data set: deterministic, and as difficult as it says."""

import json

import numpy as np
import pytest
from PIL import Image

from dino_hf.common.scenes import CATEGORIES, make_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = make_scenes(tmp_path_factory.mktemp("scenes") / "a", 80, seed=0)
    return path.parent, json.loads(path.read_text())


def test_the_same_seed_draws_the_same_files_and_another_seed_others(scenes, tmp_path):
    folder, _ = scenes
    again, other = make_scenes(tmp_path / "b", 4, seed=0).parent, make_scenes(tmp_path / "c", 4, seed=1).parent
    for number in range(1, 5):
        first, second, third = ((f / f"{number:06}.png").read_bytes() for f in (folder, again, other))
        assert first == second != third


def test_classes_have_the_shares_that_were_asked_for(tmp_path):
    path = make_scenes(tmp_path / "rare", 40, seed=0, shares=(0.7, 0.3, 0, 0, 0))
    ids = [entry["category_id"] for entry in json.loads(path.read_text())["annotations"]]
    assert set(ids) == {3, 7}
    assert ids.count(3) > 1.4 * ids.count(7)


def test_every_difficulty_is_there(scenes):
    _, content = scenes
    annotations, images = content["annotations"], content["images"]
    assert [category["id"] for category in content["categories"]] == [3, 7, 12, 21, 40]
    assert {entry["category_id"] for entry in annotations} == set(CATEGORIES)
    assert any(entry["iscrowd"] for entry in annotations)
    assert len({entry["image_id"] for entry in annotations}) < len(images)  # some images are empty
    sizes = np.array([entry["bbox"][2:] for entry in annotations])
    assert (sizes.max(1) < 16).any()
    assert (sizes.max(1) > 50).any()
    assert any(image["width"] != image["height"] for image in images)
    assert len({(image["width"], image["height"]) for image in images}) > 50


def test_boxes_lie_inside_their_image_and_hold_their_area(scenes):
    folder, content = scenes
    size = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        width, height = size[entry["image_id"]]
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        assert 0 < entry["area"] <= w * h
    with Image.open(folder / "000001.png") as picture:
        assert picture.size == size[1]
