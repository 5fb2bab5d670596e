"""--fix: whatever is broken, the copy is sound and says what was done; the original stays as it was, to the byte."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from broken_data import CASES, as_raw, break_data, make_data, make_picture
from dino_hf.data.load import load_data
from dino_hf.data.recognise import read_raw
from dino_hf.doctor import cleaned_copy
from dino_hf.doctor.boxes import ImageGeometry, clean_boxes, turn_boxes
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.cleaned_copy import write_cleaned_copy

NOTHING_TO_LEARN = {"no-boxes", "unlabelled-train"}
FOR_THE_OWNER = {  # warnings that stay
    "image-orientation-unclear",
    "near-leak",
    "image-mode",
    "box-tiny",
    "duplicate-box-other-class",
    "near-duplicate-box",
    "similar-category-name",
    "background-class",
    "category-without-boxes",
    "category-not-in-train",
    "category-not-in-validation",
    "class-imbalance",
    "unlabelled-split",
    "many-boxes",
}


def tree_hash(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fix(raw, folder) -> cleaned_copy.CleanedCopy:
    return write_cleaned_copy(raw, inspect(raw), folder)


def test_near_copies_are_left_out_on_request_only(tmp_path):
    (case,) = (case for case in CASES if case.kind == "near-leak")
    raw = break_data(case, tmp_path / "data")
    report = inspect(raw)
    kept = write_cleaned_copy(raw, report, tmp_path / "kept")
    dropped = write_cleaned_copy(raw, report, tmp_path / "dropped", drop_near_copies=True)
    assert kept.num_images["train"] == dropped.num_images["train"] + 1 == len(raw.splits["train"].images)
    assert any("--drop-near-copies" in text for text in kept.kept)


def boxes_by_file(folder: Path, split: str = "train") -> dict[str, list]:
    content = json.loads((folder / split / "_annotations.coco.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    boxes = {name: [] for name in names.values()}
    for entry in content["annotations"]:
        boxes[names[entry["image_id"]]].append(entry["bbox"])
    return boxes


@pytest.mark.parametrize("case", [case for case in CASES if case.kind not in NOTHING_TO_LEARN], ids=repr)
def test_a_copy_of_any_broken_data_is_sound_and_the_original_untouched(case, tmp_path):
    raw = break_data(case, tmp_path / "data")
    before = tree_hash(tmp_path / "data")
    copy = fix(raw, tmp_path / "fixed")
    assert tree_hash(tmp_path / "data") == before
    assert sorted(os.listdir(tmp_path)) == ["data", "fixed"]  # nothing half-written beside them

    report = inspect(read_raw(tmp_path / "fixed"))
    left = {finding.kind for finding in report.findings if finding.severity != "note"}
    assert not report.has_errors
    assert left <= FOR_THE_OWNER
    data = load_data(tmp_path / "fixed")
    assert [len(part.dataset) for part in (data.train, data.validation)] == list(copy.num_images.values())

    recorded = json.loads((tmp_path / "fixed" / "fixes.json").read_text())
    assert [change["kind"] for change in recorded["changes"]] == [change.kind for change in copy.changes]
    text = (tmp_path / "fixed" / "CHANGES.txt").read_text()
    is_note = case.kind in ("near-copy", "image-frames", "box-whole-image", "crowd", "placeholder-category")
    if case.kind in FOR_THE_OWNER or is_note:
        assert case.kind not in {change.kind for change in copy.changes}
    else:
        assert case.kind in text


def test_sound_data_are_copied_as_they_are(tmp_path):
    contents = make_data(tmp_path / "data")
    copy = fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    assert (copy.changes, copy.kept) == ([], [])
    assert copy.num_images == {"train": 6, "validation": 4}
    for name, content in contents.items():
        written = json.loads((tmp_path / "fixed" / name / "_annotations.coco.json").read_text())
        assert written == content
        for image in content["images"]:
            copied = tmp_path / "fixed" / name / image["file_name"]
            assert copied.read_bytes() == (tmp_path / "data" / name / image["file_name"]).read_bytes()


def original_boxes(folder: Path) -> dict[str, list]:
    """Those of the data before they were broken."""
    content = make_data(folder)["train"]
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return {
        name: [entry["bbox"] for entry in content["annotations"] if names[entry["image_id"]] == name]
        for name in names.values()
    }


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.kind.startswith("boxes-are")], ids=lambda case: f"{case}: {case.first}"
)
def test_boxes_of_another_layout_get_back_where_they_were(case, tmp_path):
    fix(break_data(case, tmp_path / "data"), tmp_path / "fixed")
    expected, boxes = original_boxes(tmp_path / "sound"), boxes_by_file(tmp_path / "fixed")
    assert boxes.keys() == expected.keys()
    for name, of_image in boxes.items():
        # relative numbers are rounded when they are divided and multiplied again
        np.testing.assert_allclose(np.array(of_image).reshape(-1, 4), np.reshape(expected[name], (-1, 4)), atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("box-negative", lambda boxes: boxes),  # the size had the wrong sign only
        ("box-empty", lambda boxes: [boxes[0], *boxes[2:]]),
        ("box-outside", lambda boxes: [boxes[0], *boxes[2:]]),
        ("box-not-numbers", lambda boxes: [boxes[0], *boxes[2:]]),
        ("unknown-category", lambda boxes: [boxes[0], *boxes[2:]]),
        ("box-sticks-out", lambda boxes: [boxes[0], [80, boxes[1][1], 10, boxes[1][3]], *boxes[2:]]),
        ("area-wrong", lambda boxes: boxes),
        ("duplicate-file", lambda boxes: boxes),  # together again
    ],
)
def test_what_becomes_of_a_box(kind, expected, tmp_path):
    case = next(case for case in CASES if case.kind == kind)
    fix(break_data(case, tmp_path / "data"), tmp_path / "fixed")
    boxes = boxes_by_file(tmp_path / "fixed")
    before = original_boxes(tmp_path / "sound")
    assert sorted(boxes["000.png"]) == sorted(expected(before["000.png"]))
    assert boxes["001.jpg"] == before["001.jpg"]


def test_areas_follow_their_boxes(tmp_path):
    contents = make_data(tmp_path / "data")
    entries = contents["train"]["annotations"]
    for entry, box, area in zip(
        entries[:4], ([80, 3, 20, 10], [5, 6, 10, 12], [7, 8, 10, 11], [9, 9, 8, 8]), (150, 70, 999, None), strict=True
    ):
        entry.update(bbox=box, area=area)
    fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    written = json.loads((tmp_path / "fixed/train/_annotations.coco.json").read_text())["annotations"][:4]
    # of a clipped box no more than is left; a mask's, smaller than its box, is kept
    assert [entry["area"] for entry in written] == [100, 70, 110, 64]


def test_images_that_are_in_two_splits_leave_train_and_stay_in_validation(tmp_path):
    case = next(case for case in CASES if case.kind == "leak")
    copy = fix(break_data(case, tmp_path / "data"), tmp_path / "fixed")
    assert copy.num_images == {"train": 5, "validation": 4}
    assert not (tmp_path / "fixed/train/004.png").exists()
    assert (tmp_path / "fixed/validation/102.png").exists()
    assert [(change.split, change.file) for change in copy.changes] == [("train", "004.png")]


def test_of_copies_in_a_split_the_one_with_most_boxes_stays(tmp_path):
    contents = make_data(tmp_path / "data")
    (tmp_path / "data/train/000.png").write_bytes((tmp_path / "data/train/002.png").read_bytes())
    contents["train"]["images"][0].update(width=104, height=70)
    contents["train"]["annotations"].pop(0)
    copy = fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    (change,) = copy.changes
    assert (change.kind, change.file, change.action) == ("duplicate-image", "000.png", "left out")
    assert change.before == "as 002.png of train; left out with 3 annotations"


def test_images_of_one_id_are_left_out_for_their_boxes_cannot_be_told_apart(tmp_path):
    case = next(case for case in CASES if case.kind == "duplicate-image-id")
    copy = fix(break_data(case, tmp_path / "data"), tmp_path / "fixed")
    assert [change.file for change in copy.changes] == ["002.png", "003.jpg"]
    assert copy.num_images["train"] == 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_as_exif_turns_the_image(orientation):
    """A white rectangle on black, stored, then turned by Pillow: the turned box frames it."""
    x, y, w, h = 5, 9, 21, 6
    pixels = np.zeros((40, 64), dtype=np.uint8)
    pixels[y : y + h, x : x + w] = 255
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    turned = np.asarray(ImageOps.exif_transpose(image))
    rows, columns = np.flatnonzero(turned.any(1)), np.flatnonzero(turned.any(0))
    expected = [columns[0], rows[0], len(columns), len(rows)]
    boxes = turn_boxes(np.array([[x, y, w, h], [0, 0, 64, 40.0]]), np.full(2, orientation), np.full((2, 2), (64, 40)))
    assert boxes.tolist() == [expected, [0, 0, *turned.shape[::-1]]]


def test_a_rotated_image_keeps_its_file_and_gets_its_boxes_turned(tmp_path):
    case = next(case for case in CASES if case.kind == "image-rotated")
    raw = break_data(case, tmp_path / "data")
    fix(raw, tmp_path / "fixed")
    content = json.loads((tmp_path / "fixed/train/_annotations.coco.json").read_text())
    assert (content["images"][1]["width"], content["images"][1]["height"]) == (67, 97)
    x, y, w, h = original_boxes(tmp_path / "sound")["001.jpg"][0]
    assert boxes_by_file(tmp_path / "fixed")["001.jpg"][0] == [67 - y - h, x, h, w]  # a quarter to the right
    assert (tmp_path / "fixed/train/001.jpg").read_bytes() == (tmp_path / "data/train/001.jpg").read_bytes()


def test_boxes_of_a_resized_image_are_scaled_unless_its_shape_changed(tmp_path):
    contents = make_data(tmp_path / "data")
    make_picture(1, 194, 134).save(tmp_path / "data/train/001.jpg")  # twice as large
    make_picture(2, 104, 104).save(tmp_path / "data/train/002.png")  # squeezed
    copy = fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    before, boxes = original_boxes(tmp_path / "sound"), boxes_by_file(tmp_path / "fixed")
    assert boxes["001.jpg"] == [[2 * value for value in box] for box in before["001.jpg"]]
    assert "002.png" not in boxes
    assert [(change.file, change.action) for change in copy.changes] == [
        ("001.jpg", "boxes scaled"),
        ("002.png", "left out"),
    ]


def test_what_is_not_certain_is_left_as_it_is_and_said(tmp_path):
    contents = make_data(tmp_path / "data")
    boxes = [[0.4, 0.4, 0.1, 0.1], [0.5, 0.3, 0.2, 0.2], [0.3, 0.5, 0.2, 0.1]]  # relative, but to what corner?
    for content in contents.values():
        content["annotations"] = content["annotations"][:3]
        for entry, box in zip(content["annotations"], boxes, strict=True):
            entry.update(bbox=box, area=None)
    copy = fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    assert boxes_by_file(tmp_path / "fixed")["000.png"] == boxes
    assert [text[:40] for text in copy.kept] == [
        "The boxes of train are probably (x, y, w",
        "The boxes of validation are probably (x,",
    ]
    assert inspect(read_raw(tmp_path / "fixed")).has_errors


def test_clipping_does_not_move_what_is_inside():
    boxes = np.array(
        [[3.3, 4.7, 10.1, 9.9], [-2, 5, 4, 4], [60, 38, 10, 10], [70, 5, 4, 4], [5, 5, 0, 4], [np.nan] * 4]
    )
    size = np.full((6, 2), (64.0, 40.0))
    geometry = ImageGeometry(size, size, np.ones(6), np.ones((6, 2)))
    cleaned = clean_boxes(boxes, np.full(6, np.nan), geometry)
    assert cleaned.kinds.tolist() == [
        "",
        "box-sticks-out",
        "box-sticks-out",
        "box-outside",
        "box-empty",
        "box-not-numbers",
    ]
    assert cleaned.is_kept.tolist() == [True] * 3 + [False] * 3
    assert cleaned.boxes[:3].tolist() == [[3.3, 4.7, 10.1, 9.9], [0, 5, 2, 4], [60, 38, 4, 2]]


def test_file_names_cannot_leave_the_copy_and_do_not_collide(tmp_path):
    contents = make_data(tmp_path / "data")
    names = ["../outside.png", "a/b.jpg", "C:\\pictures\\c.png", "/d.jpg", "A/B.jpg", "noending"]
    for image, name in zip(contents["train"]["images"], names, strict=True):
        image.update(path=tmp_path / "data" / "train" / image["file_name"], file_name=name)
    fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    expected = ["outside.png", "a/b.jpg", "C_/pictures/c.png", "d.jpg", "A/B_4.jpg", "noending.jpg"]
    assert list(boxes_by_file(tmp_path / "fixed")) == expected
    assert all((tmp_path / "fixed" / "train" / name).is_file() for name in expected)


def test_whoever_edits_a_copied_image_does_not_change_the_original(tmp_path):
    raw = as_raw(tmp_path / "data", make_data(tmp_path / "data"))
    before = tree_hash(tmp_path / "data")
    fix(raw, tmp_path / "fixed")
    for path in (tmp_path / "fixed").rglob("*.[pj][np]g"):
        with path.open("r+b") as file:
            file.write(b"edited in place")
    assert tree_hash(tmp_path / "data") == before


def test_a_split_of_which_nothing_is_left_is_named(tmp_path):
    contents = make_data(tmp_path / "data")
    for image in contents["train"]["images"]:
        (tmp_path / "data" / "train" / image["file_name"]).unlink()
    copy = fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    assert list(copy.num_images) == ["validation"]
    assert copy.kept == ["No image of train is left, so the copy has no such split; split the data again."]
    assert copy.kept[0] in (tmp_path / "fixed" / "CHANGES.txt").read_text()


def test_frames_of_a_fixed_camera_stay(tmp_path):
    contents = make_data(tmp_path / "data")
    pixels, noise = np.asarray(make_picture(0, 180, 120)).astype(int), np.random.default_rng(0)
    for name, content in contents.items():
        for image in content["images"]:
            image.update(width=180, height=120)
            frame = np.clip(pixels + noise.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(frame).save(tmp_path / "data" / name / image["file_name"], quality=95)
    raw = as_raw(tmp_path / "data", contents)
    copy = write_cleaned_copy(raw, inspect(raw), tmp_path / "fixed", drop_near_copies=True)
    assert copy.num_images == {"train": 6, "validation": 4}
    assert [text.split(", so")[0] for text in copy.kept] == [
        "6 images of train look like an image in another split. They are most of train, as with a fixed camera"
    ]


def test_boxes_of_too_large_numbers_are_left_out_without_a_warning(tmp_path):
    contents = make_data(tmp_path / "data")
    contents["train"]["annotations"][1]["bbox"] = [1e308] * 4
    (change,) = fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed").changes
    assert (change.kind, change.action) == ("box-not-numbers", "left out")


def test_an_empty_folder_may_be_the_current_one_or_a_link(tmp_path, monkeypatch):
    raw = as_raw(tmp_path / "data", make_data(tmp_path / "data"))
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fix(raw, ".")
    assert (tmp_path / "here" / "fixes.json").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    fix(raw, "link")
    assert (tmp_path / "there" / "fixes.json").is_file()


def test_images_inside_a_table_are_written_as_files(tmp_path):
    contents = make_data(tmp_path / "data")
    raw = as_raw(tmp_path / "data", contents)
    for split in raw.splits.values():
        for image in split.images:
            image["image"] = {"bytes": image.pop("path").read_bytes(), "path": None}
    copy = fix(raw, tmp_path / "fixed")
    assert copy.changes == []
    assert (tmp_path / "fixed/train/001.jpg").read_bytes() == (tmp_path / "data/train/001.jpg").read_bytes()


def test_a_target_with_something_in_it_or_within_the_data_is_refused(tmp_path):
    raw = as_raw(tmp_path / "data", make_data(tmp_path / "data"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"full exists and is not an empty folder; choose a new folder"):
        fix(raw, tmp_path / "full")
    with pytest.raises(ValueError, match=r"lies inside .*data, which must not be changed; choose a place outside"):
        fix(raw, tmp_path / "data" / "fixed")
    with pytest.raises(
        ValueError, match=r"lies inside .*train, which must not be changed"
    ):  # of a json that lies elsewhere
        fix(raw._replace(origin=tmp_path / "train.json"), tmp_path / "data" / "train" / "fixed")
    with pytest.raises(FileExistsError, match=r"thesis\.txt is not a folder; choose another place"):
        fix(raw, tmp_path / "full/thesis.txt/fixed")
    (tmp_path / "empty").mkdir()
    fix(raw, tmp_path / "empty")
    assert (tmp_path / "empty" / "fixes.json").is_file()
    with pytest.raises(ValueError, match="needs a report of the images too"):
        write_cleaned_copy(raw, inspect(raw, check_images=False), tmp_path / "unseen")


def test_a_copy_that_is_stopped_leaves_nothing(tmp_path):
    raw = as_raw(tmp_path / "data", make_data(tmp_path / "data"))

    def stop(done, total):
        assert total == 10
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cleaned_copy(raw, inspect(raw), tmp_path / "fixed", stop)
    assert os.listdir(tmp_path) == ["data"]


def test_without_any_box_there_is_nothing_to_copy(tmp_path):
    case = next(case for case in CASES if case.kind == "no-boxes")
    with pytest.raises(ValueError, match=r"Nothing would be left of .*data: no image has a box"):
        fix(break_data(case, tmp_path / "data"), tmp_path / "fixed")
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize(("width", "is_scaled"), [(979, True), (980, False)])  # sides times 10.093 and 10.103, and 10
def test_a_resized_image_may_have_another_shape_by_a_hundredth(width, is_scaled, tmp_path):
    contents = make_data(tmp_path / "data")
    make_picture(1, width, 670).save(tmp_path / "data/train/001.jpg")
    copy = fix(as_raw(tmp_path / "data", contents), tmp_path / "fixed")
    assert [change.action for change in copy.changes] == ["boxes scaled" if is_scaled else "left out"]


@pytest.mark.parametrize(("num_alike", "num_left"), [(3, 3), (4, 6)])  # of 6 images
def test_near_copies_stay_if_they_are_more_than_half_of_the_split(num_alike, num_left, tmp_path):
    contents = make_data(tmp_path / "data")
    frame = np.asarray(make_picture(100, 180, 120)).astype(int)
    for number, (name, image) in enumerate(
        [("validation", contents["validation"]["images"][0])]
        + [("train", image) for image in contents["train"]["images"][:num_alike]]
    ):
        noise = np.random.default_rng(number).integers(-4, 5, frame.shape)
        picture = Image.fromarray(np.clip(frame + noise, 0, 255).astype(np.uint8))
        picture.save(tmp_path / "data" / name / image["file_name"], quality=95)
        image.update(width=180, height=120)
    raw = as_raw(tmp_path / "data", contents)
    copy = write_cleaned_copy(raw, inspect(raw), tmp_path / "fixed", drop_near_copies=True)
    assert copy.num_images == {"train": num_left, "validation": 4}
