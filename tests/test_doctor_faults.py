"""Faults of the doctor that users met: right boxes made wrong, silence about what stops training, copies outside their folder."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from broken_data import make_picture
from dino_hf.data import load_data, read_raw
from dino_hf.data.rows import MOST_PIXELS
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.cleaned_copy import unique_name, write_cleaned_copy
from dino_hf.doctor.cleaning import portable_name

ROTATED = 6  # EXIF's orientation of a phone that was held upright


def write_coco(folder: Path, size, stated, boxes, num_images=2, orientation=1, **fields) -> Path:
    """Images of `size` as stored, the same boxes on each."""
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    images, annotations = [], []
    for number in range(num_images):
        make_picture(number, *size).save(folder / f"{number}.jpg", exif=exif)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": stated[0], "height": stated[1]})
        for box in boxes:
            entry = {"id": len(annotations), "image_id": number, "category_id": 1, "bbox": list(box), "iscrowd": 0}
            annotations.append(entry | fields)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "card"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def cleaned(folder: Path) -> tuple[dict, list, dict]:
    """Findings, sentences for the owner, and the content of the copy."""
    raw = read_raw(folder)
    report = inspect(raw)
    copy = write_cleaned_copy(raw, report, folder.with_name("copy"))
    content = json.loads((copy.folder / "train" / "_annotations.coco.json").read_text())
    return {finding.kind: finding for finding in report.findings}, copy.kept, content


SIZES = {
    # stored size, orientation, stated size, boxes -> finding, box and size in the copy
    "boxes upright, size as stored": (
        (120, 80),
        6,
        (120, 80),
        (10, 70, 30, 40),
        "stated-size-wrong",
        (10, 70, 30, 40),
        (80, 120),
    ),
    "boxes and size as stored": (
        (120, 80),
        6,
        (120, 80),
        (90, 10, 20, 30),
        "image-rotated",
        (40, 90, 30, 20),
        (80, 120),
    ),
    "boxes fit both turned": (
        (120, 80),
        6,
        (120, 80),
        (10, 10, 30, 20),
        "stated-size-unclear",
        (10, 10, 30, 20),
        (120, 80),
    ),
    "swapped, boxes fit the file": (
        (120, 80),
        1,
        (80, 120),
        (90, 10, 20, 30),
        "stated-size-wrong",
        (90, 10, 20, 30),
        (120, 80),
    ),
    "swapped, boxes fit both": (
        (120, 80),
        1,
        (80, 120),
        (10, 10, 20, 30),
        "stated-size-unclear",
        (10, 10, 20, 30),
        (80, 120),
    ),
    "nonsense, boxes fit the file": (
        (120, 80),
        1,
        (50, 50),
        (90, 10, 20, 30),
        "stated-size-wrong",
        (90, 10, 20, 30),
        (120, 80),
    ),
    "scaled down, boxes fit the old size": (
        (60, 40),
        1,
        (120, 80),
        (90, 10, 20, 30),
        "image-resized",
        (45, 5, 10, 15),
        (60, 40),
    ),
    "scaled up, one box": (
        (240, 160),
        1,
        (120, 80),
        (10, 10, 20, 30),
        "stated-size-unclear",
        (10, 10, 20, 30),
        (120, 80),
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_wrong_size_moves_only_boxes_that_fit_no_other_way(case, tmp_path):
    size, orientation, stated, box, kind, expected, expected_size = SIZES[case]
    found, kept, content = cleaned(write_coco(tmp_path / "data", size, stated, [box], 2, orientation))
    assert [one for one in found if one.startswith(("image-r", "stated"))] == [kind]
    assert found[kind].severity == "error"
    assert [tuple(entry["bbox"]) for entry in content["annotations"]] == [expected] * 2
    assert [(image["width"], image["height"]) for image in content["images"]] == [expected_size] * 2
    assert any("fit both" in text for text in kept) == (kind == "stated-size-unclear")
    assert found[kind].is_fixed == (kind != "stated-size-unclear")


@pytest.mark.parametrize(("num_boxes", "kind"), [(2, "stated-size-unclear"), (3, "image-resized")])
def test_many_boxes_in_one_corner_tell_that_the_image_was_enlarged(num_boxes, kind, tmp_path):
    # One box lies in a quarter of the image by a chance of about 1 in 4; three, 1 in 64. A chance of 1 in 20 is the border.
    boxes = [(10 + 20 * number, 10, 20, 30) for number in range(num_boxes)]
    found, _, content = cleaned(write_coco(tmp_path / "data", (240, 160), (120, 80), boxes, num_images=1))
    assert kind in found
    factor = 2 if kind == "image-resized" else 1
    assert content["annotations"][0]["bbox"] == [10 * factor, 10 * factor, 20 * factor, 30 * factor]


def test_images_that_are_clear_decide_for_those_that_are_not(tmp_path):
    folder = write_coco(tmp_path / "data", (120, 80), (120, 80), [(10, 70, 30, 40)], 3, ROTATED)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"][1]["bbox"] = [10, 10, 30, 20]  # fits both
    (folder / "train.json").write_text(json.dumps(content))
    found, _, content = cleaned(folder)
    assert found["stated-size-wrong"].count == 3
    assert content["annotations"][1]["bbox"] == [10, 10, 30, 20]


def camera(sides: str, share: int = 5) -> list[list[tuple]]:
    """Boxes of 20 images of 640 x 480; every `share`-th leaves it at one of the sides by 30 pixels."""
    rng, boxes = np.random.default_rng(3), []
    for number in range(40):
        w, h = int(rng.integers(70, 110)), int(rng.integers(70, 90))
        x, y = int(rng.integers(380, 640 - w)), int(rng.integers(150, 480 - h))
        if number % share == 0:
            side = sides[number // share % len(sides)]
            x, y = (640 - w + 30 if side == "r" else x), (480 - h + 30 if side == "b" else y)
        boxes.append((x, y, w, h))
    return boxes


def layout_of(tmp_path, boxes):
    folder = write_coco(tmp_path / "data", (640, 480), (640, 480), boxes, num_images=1)
    report = inspect(read_raw(folder), check_images=False)
    (reading,) = report.readings.values()
    return reading, {finding.kind: finding.severity for finding in report.findings}


def test_boxes_that_leave_at_one_side_are_not_taken_for_centres(tmp_path):
    reading, found = layout_of(tmp_path, camera("r"))
    assert (reading.layout, reading.is_as_read) == ("xywh", True)
    assert found["box-sticks-out"] == "warning"
    assert "error" not in found.values()


def test_true_centres_leave_at_two_sides_and_are_found(tmp_path):
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(60):
        w, h = rng.integers(60, 300), rng.integers(60, 200)
        x, y = rng.integers(0, 640 - w), rng.integers(0, 480 - h)
        boxes.append((float(x + w / 2), float(y + h / 2), float(w), float(h)))
    reading, found = layout_of(tmp_path, boxes)
    assert (reading.layout, reading.is_sure) == ("cxcywh", True)
    assert found["boxes-are-centres"] == "error"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"area": -1}, "area-not-number"),
        ({"area": float("nan")}, "area-not-number"),
        ({"area": float("inf")}, "area-not-number"),
        ({"area": float(MOST_PIXELS**2)}, "area-not-number"),
        ({"iscrowd": 1}, "only-crowds"),
    ],
)
def test_what_stops_training_is_an_error(fields, kind, tmp_path):
    folder = write_coco(tmp_path / "data", (120, 80), (120, 80), [(10, 10, 30, 20)], **fields)
    report = inspect(read_raw(folder))
    assert {finding.kind for finding in report.findings if finding.severity == "error"} == {kind}
    if kind == "area-not-number":
        with pytest.raises(ValueError, match="it must be a number of pixels"):
            load_data(folder)
        _, _, content = cleaned(folder)
        assert {entry["area"] for entry in content["annotations"]} == {600}
        load_data(folder.with_name("copy"), validation_fraction=0)


def test_the_largest_area_that_training_takes_is_no_error(tmp_path):
    folder = write_coco(tmp_path / "data", (120, 80), (120, 80), [(10, 10, 30, 20)], area=float(MOST_PIXELS**2 - 2**20))
    report = inspect(read_raw(folder))
    assert not report.has_errors
    load_data(folder, validation_fraction=0)


def test_names_that_are_not_utf8_are_named(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    try:
        with open(os.fsencode(tmp_path) + b"/data/images/K\xfche.png", "wb") as file:
            make_picture(0, 60, 40).save(file, "PNG")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    with open(os.fsencode(tmp_path) + b"/data/labels/K\xfche.txt", "w") as file:
        file.write("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data" / "data.yaml").write_text("train: images\nnames: [cow]\n")
    with pytest.raises(ValueError, match=r"K\\udcfche\.png.*UTF-8.*; rename the file"):
        load_data(tmp_path / "data")
    report = inspect(read_raw(tmp_path / "data"))
    assert report.has_errors
    assert "udcfche.png" in report.findings[0].offenders[0].value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("..", "_"), (".", "_"), ("a/b", "a_b"), ("C:\\x", "C__x"), ("con", "_con"), ("nul.png", "_nul.png"), ("a. ", "a"),
        ("", "_"), ("b\0\n", "b__"), ("\udcfc", "_"), ("x" * 300 + ".png", "x" * 196 + ".png"), ("val-2017", "val-2017"),
    ],
)  # fmt: skip
def test_names_of_the_copy_are_names_below_its_folder(name, expected):
    assert portable_name(name) == expected


def test_splits_of_one_portable_name_get_two_folders():
    taken = {"changes.txt"}
    assert [unique_name(name, taken) for name in ("a", "A", "a", "CHANGES.txt")] == ["a", "A_2", "a_3", "CHANGES.txt_2"]


def test_a_split_called_dot_dot_stays_below_the_copy(tmp_path):
    file = io.BytesIO()
    make_picture(0, 64, 48).save(file, "PNG")
    features = Features(
        image=ImageFeature(),
        objects={"bbox": List(List(Value("float64"))), "category": List(ClassLabel(names=["cat"]))},
    )
    rows = {
        "image": [{"bytes": file.getvalue(), "path": "0.png"}],
        "objects": [{"bbox": [[2.0, 3.0, 20.0, 20.0]], "category": [0]}],
    }
    raw = read_raw(Dataset.from_dict(rows, features=features))
    (split,) = raw.splits.values()
    raw = raw._replace(splits={"..": split._replace(name="..")})
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "_annotations.coco.json").write_text("mine")
    write_cleaned_copy(raw, inspect(raw), tmp_path / "place" / "cleaned")
    assert (tmp_path / "place" / "_annotations.coco.json").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == ["_annotations.coco.json", "cleaned"]
    assert (tmp_path / "place" / "cleaned" / "_" / "0.png").is_file()
