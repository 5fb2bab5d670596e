"""Images whose size the annotations do not state: boxes are checked against the size of the file."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from dino_hf.data import load_data
from dino_hf.data.load import load_coco

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
    with pytest.raises(ValueError, match=r"row 3.*wholly outside of its image, which is 160 wide and 120 high"):
        load_data(stored(paths, found))
    (tmp_path / "3.jpg").write_bytes(b"no image")
    rows = load_data(stored(paths, found), validation_fraction=0).train.dataset
    assert list(rows["width"]) == [WIDTH] * 3 + [None] + [WIDTH] * 8
