"""Boxes with y before x, and boxes in percent: found on every way in, converted by --fix, and never seen in right data."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from data_layouts import annotations_of
from dino_hf.data import load_data, read_raw
from dino_hf.data.box_layouts import guess_reading
from dino_hf.data.load import load_coco
from dino_hf.data.raw import RawSplit, make_box_table
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.cleaned_copy import write_cleaned_copy
from dino_hf.evaluation import load_split

WIDTH, HEIGHT = 320, 240
NUM_IMAGES = 8
FORMS = {
    "yxyx": lambda x, y, w, h: (y, x, y + h, x + w),
    "yxhw": lambda x, y, w, h: (y, x, h, w),
    "xywh %": lambda x, y, w, h: (x / 3.2, y / 2.4, w / 3.2, h / 2.4),
    "xyxy %": lambda x, y, w, h: (x / 3.2, y / 2.4, (x + w) / 3.2, (y + h) / 2.4),
    "cxcywh %": lambda x, y, w, h: ((x + w / 2) / 3.2, (y + h / 2) / 2.4, w / 3.2, h / 2.4),
}
SENTENCES = {
    "yxyx": r"as two corners with y before x, \(y0, x0, y1, x1\), 0 do: convert them",
    "yxhw": r"as \(y, x, height, width\), 0 do: convert them",
    "xywh %": r"the boxes are in percent of the image \(0 to 100\).* multiply them by width / 100 and height / 100",
    "xyxy %": r"in percent of the image .* and convert them from two corners to \(x, y, width, height\)",
    "cxcywh %": r"in percent of the image .* and convert them from centre, width and height",
}


def right_boxes(count=3 * NUM_IMAGES, seed=0, width=WIDTH, height=HEIGHT):
    rng = np.random.default_rng(seed)
    w, h = rng.uniform(0.1, 0.4, count) * width, rng.uniform(0.1, 0.4, count) * height
    return np.stack([rng.uniform(0, 1, count) * (width - w), rng.uniform(0, 1, count) * (height - h), w, h], axis=1)


def written(form):
    return np.stack(FORMS[form](*right_boxes().T), axis=1).tolist()


def write_images(folder, size=(WIDTH, HEIGHT)):
    folder.mkdir(parents=True)
    for number in range(NUM_IMAGES):
        noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(folder / f"{number}.jpg")
    return folder


def write_coco(folder, boxes, size=(WIDTH, HEIGHT), stated=(WIDTH, HEIGHT)):
    write_images(folder, size)
    images = [
        {"id": number, "file_name": f"{number}.jpg", "width": stated[0], "height": stated[1]}
        for number in range(NUM_IMAGES)
    ]
    annotations = [
        {"id": number, "image_id": number % NUM_IMAGES, "category_id": 1, "bbox": list(box), "iscrowd": 0}
        for number, box in enumerate(boxes)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "fox"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def as_dataset(folder, boxes, key="train"):
    write_images(folder)
    rows = [
        {"image": str(folder / f"{number}.jpg"), "objects": {"bbox": boxes[number::NUM_IMAGES], "category": [0] * 3}}
        for number in range(NUM_IMAGES)
    ]
    return DatasetDict({key: Dataset.from_list(rows).cast_column("image", ImageFeature())})


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_refused_and_converted(tmp_path, form):
    folder = write_coco(tmp_path / "data", written(form))
    for read in (load_data, lambda path: load_coco(path / "train.json", path), lambda path: load_split(path, "train")):
        with pytest.raises(ValueError, match=SENTENCES[form]):
            read(folder)
    loaded = load_data(folder, trust_boxes=True, validation_fraction=0) if "%" in form else None
    assert loaded is None or len(loaded.train.dataset) == NUM_IMAGES
    raw = read_raw(folder)
    report = inspect(raw)
    kind = "boxes-are-percent" if "%" in form else "boxes-are-swapped"
    (finding,) = [finding for finding in report.findings if finding.severity == "error"]
    assert (finding.kind, finding.count) == (kind, 3 * NUM_IMAGES)
    assert "certainly" in finding.what
    copy = write_cleaned_copy(raw, report, tmp_path / "copy")
    content = json.loads((copy.folder / "train/_annotations.coco.json").read_text())
    found = np.array([entry["bbox"] for entry in content["annotations"]])
    np.testing.assert_allclose(found, right_boxes(), atol=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_dict_is_refused(tmp_path, form):
    data = as_dataset(tmp_path / "images", written(form))
    with pytest.raises(ValueError, match=SENTENCES[form]) as error:
        load_data(data)
    assert "box_format=" not in str(error.value)
    with pytest.raises(ValueError, match=SENTENCES[form]):
        load_split(as_dataset(tmp_path / "test", written(form), "test"), "test")


def test_a_named_format_with_y_before_x_is_refused(tmp_path):
    data = as_dataset(tmp_path / "images", written("yxyx"))
    with pytest.raises(ValueError, match=SENTENCES["yxhw"]):
        load_data(data, box_format="xyxy")
    load_data(as_dataset(tmp_path / "right", right_boxes().tolist()))


def test_yolo_in_percent_is_told_from_pixels(tmp_path):
    for name, form, expected in (
        ("percent", "cxcywh %", r"in percent of the image .* have them relative to the image \(0 to 1\): divide them by 100"),
        ("pixels", None, r"the boxes are in pixels, .*: divide them by width and height"),
    ):  # fmt: skip
        folder = tmp_path / name
        write_images(folder / "images/train")
        (folder / "labels/train").mkdir(parents=True)
        boxes = written(form) if form else right_boxes() + np.array([20, 15, 0, 0])
        for number in range(NUM_IMAGES):
            lines = [" ".join(map(str, [0, *box])) for box in boxes[number::NUM_IMAGES]]
            (folder / "labels/train" / f"{number}.txt").write_text("\n".join(lines))
        (folder / "data.yaml").write_text("path: .\ntrain: images/train\nnames: [fox]\n")
        with pytest.raises(ValueError, match=expected):
            load_data(folder)


def test_stated_sizes_that_are_swapped_do_not_make_boxes_swapped(tmp_path):
    boxes = right_boxes().tolist()
    folder = write_coco(tmp_path / "data", boxes, stated=(HEIGHT, WIDTH))
    for check_images in (True, False):
        kinds = {finding.kind for finding in inspect(read_raw(folder), check_images=check_images).findings}
        assert "boxes-are-swapped" not in kinds
    turned = [[y, x, h, w] for x, y, w, h in boxes]
    other = write_coco(tmp_path / "other", turned, size=(HEIGHT, WIDTH), stated=(WIDTH, HEIGHT))
    assert "boxes-are-swapped" not in {
        finding.kind for finding in inspect(read_raw(other), check_images=False).findings
    }


# Data of 24 boxes in 8 images, without files


def reading_of(boxes, size=(WIDTH, HEIGHT), num_images=NUM_IMAGES):
    images = [{"id": number, "width": size[0], "height": size[1]} for number in range(num_images)]
    annotations = [
        {"image_id": number % num_images, "category_id": 1, "bbox": list(box)} for number, box in enumerate(boxes)
    ]
    split = RawSplit("train", "here", images, annotations_of(annotations))
    return guess_reading([make_box_table(split, [{"id": 1, "name": "fox"}])], "coco")


@pytest.mark.parametrize("seed", range(15))
def test_right_boxes_are_as_read(seed):
    """Also those at one corner of their images, those drawn over its border, and a logo that is always at one place."""
    boxes = right_boxes(seed=seed)
    assert reading_of(boxes).is_as_read
    assert reading_of(boxes * [0.5, 1, 0.5, 1]).is_as_read
    assert reading_of(boxes * 0.4).is_as_read
    over = boxes * [0.7, 1, 0.7, 1]
    over[:8, 1] = HEIGHT + 15 - over[:8, 3]
    assert reading_of(over).is_as_read
    logo = np.array([10, 8, 80, 70]) + np.random.default_rng(seed).uniform(-4, 4, (24, 4))
    assert reading_of(logo, (1920, 1080)).is_as_read
    centred = np.random.default_rng(seed).uniform([18, 18, 55, 55], [25, 25, 70, 70], (60, 4))
    assert reading_of(centred, (120, 118), 60).is_as_read


@pytest.mark.parametrize(
    ("num_far", "num_boxes", "is_as_read"), [(2, 10, True), (3, 10, False), (3, 30, False), (3, 31, True)]
)
def test_three_boxes_and_a_tenth_must_leave_far(num_far, num_boxes, is_as_read):
    near = [(20, 150, 30, 70)] * (num_boxes - num_far)  # as corners they have a negative size
    assert reading_of(near[:-1] + [(60, 20, 20, 60)] + [(20, 220, 30, 90)] * num_far).is_as_read == is_as_read


@pytest.mark.parametrize(("height", "is_as_read"), [(44, True), (44.1, False)])  # 240 + a tenth of it
def test_boxes_leave_far_by_a_tenth(height, is_as_read):
    assert reading_of([(100, 220, 40, height), (20, 219, 90, 15)] * 6).is_as_read == is_as_read


@pytest.mark.parametrize(("layouts", "is_sure"), [("size", True), ("both", False)])
def test_swapped_boxes_are_sure_if_one_layout_fits(layouts, is_sure):
    """Large boxes that fit as sizes and as corners are taken for sizes."""
    boxes = [(60, 230, 40, 70), (10, 150, 90, 160)] if layouts == "size" else [(20, 40, 90, 260), (10, 30, 80, 270)]
    reading = reading_of(boxes * 6)
    assert (reading.layout, reading.is_sure) == ("yxhw", is_sure)
    assert not reading_of(boxes * 2).is_sure


def percent(low=(1, 1), high=(99, 99), count=24):
    """Boxes that fill the given part of the square of 100 x 100."""
    boxes = right_boxes(count, width=60, height=60) + np.array([20, 20, 0, 0])
    boxes[0] = [*low, 30, 30]
    boxes[1] = [high[0] - 30, high[1] - 30, 30, 30]
    return boxes


@pytest.mark.parametrize("axis", [0, 1])
def test_boxes_in_percent_fill_the_square(axis):
    for place, is_percent in ((20, True), (20.5, False)):
        low = [20.0, 20.0]
        low[axis] = place
        assert (reading_of(percent(low)).unit == "percent") == is_percent
    for place, is_percent in ((75, True), (74.5, False)):
        boxes = percent((5, 5))
        boxes[1:, axis] *= 0.6
        boxes[1, axis] = place - 30
        assert (reading_of(boxes).unit == "percent") == is_percent
    for place, is_percent in ((102, True), (102.1, False)):
        assert (reading_of(percent((1, 1), (place, place))).unit == "percent") == is_percent


@pytest.mark.parametrize(("side", "is_percent"), [(119, True), (118.9, False)])  # 99 + 2 * 5 + 10
def test_boxes_in_percent_are_off_centre(side, is_percent):
    boxes = percent((5, 5), (99, 99))
    assert (reading_of(boxes, (500, side), 30).unit == "percent") == is_percent


@pytest.mark.parametrize(("factor", "is_percent"), [(1.0, True), (0.7, False)])
def test_boxes_in_percent_are_spread(factor, is_percent):
    """Corners at 10 +- 6 and 90 +- 6; and at 10 +- 4.2 and 90 +- 4.2."""
    corners = np.array([[10.0, 10, 90, 90]] * 24) + factor * np.array([[6.0], [-6.0]] * 12)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    assert (reading_of(boxes).unit == "percent") == is_percent


def test_chance_must_not_put_boxes_in_percent_together():
    """Of boxes anywhere in 200 x 158 pixels, a third lie in the square: 3.16 ** 6 is less than 1,000, and 3.17 ** 6 more."""
    for height, is_percent in ((158, False), (159, True)):
        for count, num_images in ((6, 6), (6, 2), (24, 2)):
            boxes = percent(count=count)
            assert (reading_of(boxes, (200, height), num_images).unit == "percent") == is_percent
