"""load_data: which data are held out, what it says about that, and what it refuses."""

import json
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from data_layouts import coco_content, draw_splits, write_layout
from dino_hf.data import load_data, read_raw
from dino_hf.data.load import DetectionData
from dino_hf.data.rows import class_space, to_rows


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("scenes"), train=12, validation=3, test=4)


def names_of(data):
    return set() if data is None else set(data.dataset["file_name"])


def test_without_validation_data_a_part_of_the_training_data_is_held_out(splits, tmp_path):
    parts = {"train": splits["train"], "test": splits["test"]}
    source = write_layout("roboflow-voc", parts, tmp_path / "data")
    data = load_data(source, validation_fraction=0.25, seed=5)
    assert (len(data.train.dataset), len(data.validation.dataset), len(data.test.dataset)) == (9, 3, 4)
    assert names_of(data.train) | names_of(data.validation) == {f"train/{scene.path.name}" for scene in splits["train"]}
    assert not names_of(data.train) & names_of(data.validation)
    assert names_of(data.test) == {f"test/{scene.path.name}" for scene in splits["test"]}
    assert (data.train.id2label, data.train.category_ids) == (data.validation.id2label, data.validation.category_ids)
    assert data.notes[-1] == (
        "There are no validation data: 3 of 12 training images are held out, with a share of each class and seed 5."
    )
    assert data.validation.name == "data, train, 0.25 held out by seed 5"
    again = load_data(source, validation_fraction=0.25, seed=5)
    assert (names_of(again.train), names_of(again.validation)) == (names_of(data.train), names_of(data.validation))
    assert names_of(load_data(source, validation_fraction=0.25, seed=6).validation) != names_of(data.validation)
    for row in data.validation.dataset:
        assert row["image"].size == (row["width"], row["height"])


def test_own_validation_data_are_taken_and_nothing_is_held_out(splits, tmp_path):
    data = load_data(write_layout("yolo", splits, tmp_path / "data"))
    assert [len(part.dataset) for part in data[:3]] == [12, 3, 4]
    assert len(data.notes) == 1


def test_parts_that_are_not_there_are_none(splits, tmp_path):
    for index, name in enumerate(DetectionData._fields[:3]):
        parts = {name: splits[name]}
        data = load_data(write_layout("coco", parts, tmp_path / name), validation_fraction=0)
        assert [part is not None for part in data[:3]] == [index == place for place in range(3)]


def test_augmented_copies_of_one_photo_are_held_out_together(tmp_path):
    images = [{"id": index, "file_name": f"photo{index // 3}_jpg.rf.{index:08x}.png"} for index in range(30)]
    annotations = [{"image_id": image["id"], "category_id": 1, "bbox": [1, 1, 5, 6]} for image in images[:18]]
    for image in images:
        Image.new("RGB", (20, 10)).save(tmp_path / image["file_name"])
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(content))
    data = load_data(tmp_path, validation_fraction=0.3)
    photos = [{name.split(".rf.")[0] for name in names_of(part)} for part in data[:2]]
    assert (len(data.validation.dataset), len(photos[1])) == (9, 3)
    assert not photos[0] & photos[1]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 20])
def test_a_fraction_that_is_none_is_said(fraction, tmp_path):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction} must be at least 0 and less than 1"):
        load_data(tmp_path, validation_fraction=fraction)


def test_boxes_without_size_are_left_out_and_a_note_says_so(splits, tmp_path):
    folder = write_layout("coco", {"train": splits["train"]}, tmp_path / "data")
    json_file = folder / "annotations/instances_train2017.json"
    content = json.loads(json_file.read_text())
    content["annotations"][2]["bbox"][2] = 0
    json_file.write_text(json.dumps(content))
    data = load_data(folder, validation_fraction=0)
    assert (
        "train: 1 box has no size and is left out of training and evaluation; the first is annotations[2]"
        in data.notes[1]
    )
    assert (
        sum(map(len, (objects["bbox"] for objects in data.train.dataset["objects"]))) == len(content["annotations"]) - 1
    )


def test_advice_is_given_where_the_doctor_can_look(splits, tmp_path):
    folder = write_layout("coco", {"train": splits["train"]}, tmp_path / "data")
    (folder / "train2017" / splits["train"][3].path.name).unlink()
    advice = rf"`dino-hf doctor {folder}` lists all errors, and --fix writes a cleaned copy\.$"
    with pytest.raises(FileNotFoundError, match=rf"train_000004\.png, listed in .*, does not exist\. {advice}"):
        load_data(folder)
    data = Dataset.from_dict({"image": ["gone.png"], "objects": [{"bbox": [[1, 2, 3, 4]], "category": [1]}]})
    with pytest.raises(FileNotFoundError, match=r"gone\.png, listed in Dataset, train, does not exist\.$"):
        load_data(data)


def test_ids_must_differ_within_a_split(splits, tmp_path):
    folder = write_layout("coco-flat", {"train": splits["train"]}, tmp_path / "data")
    content = coco_content(splits["train"])
    content["images"][1]["id"] = 1
    (folder / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has two image entries with id=1; ids must differ"):
        load_data(folder)


def test_rows_cost_little_memory(tmp_path):
    """What stays after reading is Arrow: some hundred bytes for each image, and no Python objects."""
    rng = np.random.default_rng(0)
    num_images, boxes = 3_000, rng.uniform(1, 50, (9_000, 4)).round(2).tolist()
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.png", "width": 200, "height": 100} for i in range(num_images)],
        "annotations": [
            {"id": i, "image_id": i // 3, "category_id": 1, "bbox": box, "area": 5.0, "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    image = tmp_path / "one.png"
    Image.new("RGB", (200, 100)).save(image)
    tracemalloc.start()
    raw = read_raw(path)
    split = raw.splits["train"]
    for entry in split.images:
        entry["path"] = image  # to be there
    data, _ = to_rows(split, class_space(raw.categories, path))
    del raw, split, entry
    left, peak = tracemalloc.get_traced_memory()  # of Python's objects; Arrow counts for itself
    tracemalloc.stop()
    assert left < 100 * num_images
    assert peak < 10_000 * num_images
    assert data.dataset.data.nbytes < 400 * num_images


@pytest.mark.parametrize("seed", [-1, "x", None])
def test_a_seed_that_is_none_is_said(seed, tmp_path):
    with pytest.raises(ValueError, match=r"seed=.* must be a whole number, at least 0"):
        load_data(tmp_path, seed=seed)


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(ValueError, match="The path of the data is empty"):
        load_data("")


def test_relative_boxes_are_not_taken_for_pixels(splits, tmp_path):
    folder = write_layout("coco-flat", {"train": splits["train"]}, tmp_path / "data")
    content = coco_content(splits["train"])
    for entry in content["annotations"]:
        entry["bbox"] = [0.25, 0.25, 0.5, 0.75]
    (folder / "train.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match=r"the boxes are relative to the image, while coco data have them in pixels: multiply them by width and height",
    ):
        load_data(folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("images", "width", float("inf"), "image 1 has width=inf and height="),
        ("images", "width", 10**30, "they must be numbers of pixels"),
        ("images", "file_name", "", "has file_name=''; it must be a text that is not empty"),
        (
            "annotations",
            "bbox",
            [1, 2, 10**400, 3],
            r"annotations\[0\] has bbox=.*; it must be \(x, y, width, height\)",
        ),
        ("annotations", "bbox", [True, 2, 3, 3], r"has bbox=\[True, 2, 3, 3\]; it must be"),
        ("annotations", "image_id", True, "has image_id=True; it must be a whole number or a text"),
        ("annotations", "area", float("nan"), "has area=nan; it must be a number of pixels, or be left out"),
        ("annotations", "area", -5, "has area=-5; it must be"),
    ],
)
def test_numbers_that_nothing_can_hold_are_said(part, field, value, message, splits, tmp_path):
    folder = write_layout("coco-flat", {"train": splits["train"]}, tmp_path / "data")
    content = coco_content(splits["train"])
    content[part][0][field] = value
    (folder / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_data(folder)
