"""Columns of raw data: categories of several splits, and sizes that the annotations do not state."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from data_layouts import annotations_of
from dino_hf.data import load_data
from dino_hf.data.load import load_coco
from dino_hf.data.raw import RawSplit, merge_categories

FIRST = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def split_of(*category_ids: int) -> RawSplit:
    return RawSplit("validation", "val.json", [], annotations_of([{"category_id": one} for one in category_ids]))


def merged(split: RawSplit, own: list[dict]) -> tuple[list[int], list[dict], list[str]]:
    categories = [dict(entry) for entry in FIRST]
    split, notes = merge_categories(categories, split, own)
    return [entry["category_id"] for entry in split.annotations], categories, notes


def test_the_same_numbers_stay():
    ids, categories, notes = merged(split_of(2, 5, 9), [{"id": 2, "name": "dog"}, {"id": 5, "name": "cow"}])
    assert ids == [2, 5, 9]  # 9 is unknown, and remains so
    assert [entry["name"] for entry in categories] == ["cat", "dog", "cow"]
    assert notes == []


def test_other_numbers_are_changed_by_name():
    own = [{"id": 1, "name": "cow"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    ids, categories, notes = merged(split_of(1, 2, 3), own)
    assert ids == [3, 1, 2]
    assert {entry["id"]: entry["name"] for entry in categories} == {1: "cat", 2: "dog", 3: "cow"}
    assert "val.json: the class ids differ from the first split" in notes[0]


def test_an_unknown_number_does_not_become_a_class_of_the_first_split():
    ids, categories, _ = merged(split_of(1, 2, 7), [{"id": 1, "name": "dog"}])
    assert ids[0] == 2
    assert not {ids[1], ids[2]} & {entry["id"] for entry in categories}


WIDTH, HEIGHT = 160, 120
LAYOUTS = {
    "xywh": lambda x, y, w, h: [x, y, w, h],
    "xyxy": lambda x, y, w, h: [x, y, x + w, y + h],
    "cxcywh": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
}


def write_images(folder, num=12):
    """Turned by EXIF: as stored, they are 120 wide and 160 high."""
    exif = Image.Exif()
    exif[274] = 6
    for index in range(num):
        Image.new("RGB", (HEIGHT, WIDTH), (20 * index, 90, 30)).save(folder / f"{index}.jpg", exif=exif)
    return [str(folder / f"{index}.jpg") for index in range(num)]


def boxes(layout, is_relative, num=12):
    """One for each image, at the right and lower border, where corners read as sizes leave."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 50, (num, 2)).tolist()
    found = [LAYOUTS[layout](WIDTH - w - 3.0, HEIGHT - h - 3.0, float(w), float(h)) for w, h in sizes]
    unit = (WIDTH, HEIGHT, WIDTH, HEIGHT) if is_relative else (1, 1, 1, 1)
    return [[value / one for value, one in zip(box, unit, strict=True)] for box in found]


def stored(paths, found):
    rows = [
        {"image": path, "objects": {"bbox": [box], "category": [0]}} for path, box in zip(paths, found, strict=True)
    ]
    return DatasetDict(train=Dataset.from_list(rows).cast_column("image", ImageFeature()))


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_are_compared_with_the_files_where_no_size_is_stated(tmp_path, layout, is_relative):
    data = stored(write_images(tmp_path), boxes(layout, is_relative))
    box_format = layout + "n" * is_relative
    if box_format != "xywh":
        with pytest.raises(ValueError, match=f'box_format="{box_format}"'):
            load_data(data)
    rows = load_data(data, box_format=box_format, validation_fraction=0).train.dataset
    expected = np.array(boxes("xywh", False))
    np.testing.assert_allclose([objects["bbox"][0] for objects in rows["objects"]], expected, atol=1e-9)
    assert set(zip(rows["width"], rows["height"], strict=True)) == {(WIDTH, HEIGHT)}


def test_a_json_without_sizes_is_compared_with_the_files(tmp_path):
    paths = write_images(tmp_path)
    content = {
        "images": [{"id": index, "file_name": f"{index}.jpg"} for index in range(len(paths))],
        "annotations": [
            {"id": index, "image_id": index, "category_id": 1, "bbox": box}
            for index, box in enumerate(boxes("xyxy", False))
        ],
        "categories": [{"id": 1, "name": "disc"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    for read in (load_data, lambda path: load_coco(path, tmp_path)):
        with pytest.raises(ValueError, match="as two corners, 0 do"):
            read(tmp_path / "annotations.json")


def test_a_box_outside_of_the_file_is_named_and_a_broken_file_is_left_to_others(tmp_path):
    paths = write_images(tmp_path)
    found = boxes("xywh", False)
    found[3] = [WIDTH + 10.0, 5.0, 20.0, 20.0]
    with pytest.raises(ValueError, match=r"row 3.*outside of its image of 160 x 120 pixels"):
        load_data(stored(paths, found))
    (tmp_path / "3.jpg").write_bytes(b"no image")
    rows = load_data(stored(paths, found), validation_fraction=0).train.dataset
    assert list(rows["width"]) == [WIDTH] * 3 + [None] + [WIDTH] * 8
