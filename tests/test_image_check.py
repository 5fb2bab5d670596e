"""Images that would stop an epoch are found before the first step."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from dino_hf.data import CocoData, DetectionData, load_data
from dino_hf.run import image_check
from dino_hf.run.image_check import bad_images, leave_out_bad_images


def truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


def turn(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).copy().save(path, exif=exif)


def resize(path):
    Image.open(path).resize((60, 40)).save(path)


def empty(path):
    path.write_bytes(b"")


@pytest.fixture
def folder(tmp_path):
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        (tmp_path / split).mkdir()
        images, boxes = [], []
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 255, (80, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 120, "height": 80})
            if number:
                boxes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [10, 8, 30, 20], "area": 600})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "roo"}]}
        (tmp_path / split / "annotations.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("spoil", [truncate, turn, resize, empty])
@pytest.mark.parametrize(("part", "number"), [("train", 3), ("validation", 7)])
def test_a_bad_image_is_left_out_with_a_word_or_stops(folder, spoil, part, number):
    spoil(folder / part / f"{number}.jpg")
    data = load_data(folder)
    kept, warnings = leave_out_bad_images(data, "skip", False)
    names = [f"{one}.jpg" for one in (*range(6), *range(6, 9)) if one != number]
    assert [*kept.train.dataset["file_name"], *kept.validation.dataset["file_name"]] == names
    assert len(warnings) == 1
    assert warnings[0].startswith(f"1 of {6 if part == 'train' else 3} {part} images cannot be used. ")
    assert f"{number}" in warnings[0].partition(". ")[2]
    with pytest.raises(ValueError, match=f"{part} images cannot be used.*--on-bad-image skip"):
        leave_out_bad_images(data, "raise", False)


def test_good_images_stay(folder):
    data = load_data(folder)
    assert leave_out_bad_images(data, "raise", True) == (data, [])


@pytest.mark.parametrize(("most", "decode_all", "found"), [(6, False, 1), (5, False, 0), (5, True, 1)])
def test_of_many_images_only_the_starts_are_read(folder, monkeypatch, most, decode_all, found):
    monkeypatch.setattr(image_check, "MOST_DECODED", most)
    truncate(folder / "train/2.jpg")
    assert len(leave_out_bad_images(load_data(folder), "skip", decode_all)[1]) == found


def test_sizes_are_checked_without_decoding(folder):
    resize(folder / "train/1.jpg")
    turn(folder / "train/4.jpg")
    bad = bad_images(load_data(folder).train, decode=False)
    assert list(bad) == [1, 4]
    assert "resized" in bad[1]


@pytest.mark.parametrize("num_bad", [3, 4])
def test_most_images_are_not_left_out(folder, num_bad):
    for number in range(num_bad):
        empty(folder / f"train/{number}.jpg")
    data = load_data(folder)
    if num_bad == 3:
        assert len(leave_out_bad_images(data, "skip", False)[0].train.dataset) == 3
    else:
        with pytest.raises(ValueError, match=r"4 of 6 train images .*And 1 more.*too many"):
            leave_out_bad_images(data, "skip", False)


@pytest.mark.parametrize(("count", "is_decoded"), [(2000, True), (2001, False)])
def test_up_to_2000_images_are_decoded(count, is_decoded, monkeypatch):
    seen = []
    monkeypatch.setattr(image_check, "bad_images", lambda data, decode: seen.append(decode) or {})
    splits = DetectionData(*(SimpleNamespace(dataset=range(size)) for size in (count, 7, 5)), [], "here")
    assert leave_out_bad_images(splits, "skip", False) == (splits, [])
    assert seen == [is_decoded, True, True]


@pytest.mark.parametrize(("num_bad", "text"), [(3, "a. b. c. They"), (4, "a. b. c. And 1 more. They")])
def test_three_bad_images_are_named_and_half_may_be_left_out(num_bad, text, monkeypatch):
    bad = dict(zip(range(num_bad), ("a.", "b.", "c.", "d."), strict=False))
    monkeypatch.setattr(image_check, "bad_images", lambda data, decode: bad)
    for count, is_refused in ((2 * num_bad, False), (2 * num_bad - 1, True)):
        data = CocoData(Dataset.from_dict({"number": range(count)}), {1: "roo"}, [1])
        splits = DetectionData(data, None, None, [], "here")
        if is_refused:
            with pytest.raises(ValueError, match="They are too many to leave out"):
                leave_out_bad_images(splits, "skip", False)
            continue
        found, (warning,) = leave_out_bad_images(splits, "skip", False)
        assert text in warning
        assert found.train.dataset["number"] == list(range(num_bad, count))
