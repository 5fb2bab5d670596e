"""Names that no file can hold, and files outside of the data set, are left out of what readers return."""

import pytest

from data_layouts import annotations_of
from dino_hf.data.files import DataFolder, is_address, is_text, only_usable
from dino_hf.data.raw import RawDataset, RawSplit

LONE = "a\udcff.jpg"  # half of a surrogate pair: how Python reads a name that is not UTF-8


def raw_dataset(images, categories=({"id": 1, "name": "disc"},)) -> RawDataset:
    annotations = [{"image_id": image["id"], "category_id": 1, "bbox": [1, 2, 3, 4]} for image in images]
    split = RawSplit("train", "data.json", images, annotations_of(annotations))
    return RawDataset("coco", "data.json", {"train": split}, list(categories), [])


def test_usable_data_stay_the_same_object():
    raw = raw_dataset([{"id": 3, "file_name": "a.jpg"}, {"id": 5, "file_name": "b é.jpg"}])
    usable = only_usable(raw)
    assert usable == raw
    assert usable.splits["train"] is raw.splits["train"]


@pytest.mark.parametrize(("name", "reason"), [(LONE, "not valid UTF-8"), ("a\0.jpg", "has a zero byte")])
def test_an_image_whose_name_is_no_text_goes_with_its_annotations(name, reason):
    raw = raw_dataset([{"id": 3, "file_name": "a.jpg"}, {"id": 5, "file_name": name}, {"id": 8, "file_name": "c.jpg"}])
    usable = only_usable(raw)
    assert [image["id"] for image in usable.splits["train"].images] == [3, 8]
    assert [entry["image_id"] for entry in usable.splits["train"].annotations] == [3, 8]
    [problem] = usable.problems
    assert (problem.kind, problem.where) == ("bad-entry", "data.json: image 5")
    assert problem.message.startswith(f"data.json: image 5 has the file {name!r}")
    assert reason in problem.message


def test_the_path_counts_where_the_name_is_text():
    raw = raw_dataset([{"id": 5, "file_name": "a.jpg", "path": f"/data/{LONE}"}])
    [problem] = only_usable(raw).problems
    assert repr(f"/data/{LONE}") in problem.message


def test_annotations_stay_where_another_image_has_the_same_id():
    raw = raw_dataset([{"id": 3, "file_name": LONE}, {"id": 3, "file_name": "b.jpg"}])
    split = only_usable(raw).splits["train"]
    assert (len(split.images), len(split.annotations)) == (1, 2)


def test_files_outside_of_the_data_set_are_left_out_unless_they_are_allowed(tmp_path):
    inside, outside = tmp_path / "data" / "a.jpg", tmp_path / "b.jpg"
    images = [{"id": 3, "file_name": "a.jpg", "path": inside}, {"id": 5, "file_name": "b.jpg", "path": outside}]
    raw = raw_dataset([*images, {"id": 6, "file_name": "c.jpg"}])
    usable = only_usable(raw, DataFolder(inside.parent))
    assert [image["id"] for image in usable.splits["train"].images] == [3, 6]
    [problem] = usable.problems
    assert (problem.kind, problem.where) == ("outside", "data.json: image 5")
    assert problem.message.startswith(f"data.json: image 5: {outside} leads to ")
    for files in (None, DataFolder(inside.parent, allow_outside=True)):
        assert len(only_usable(raw, files).splits["train"].images) == 3


def test_a_class_name_that_is_no_text_is_mended_with_a_problem():
    raw = raw_dataset([{"id": 3, "file_name": "a.jpg"}], [{"id": 1, "name": "a\udcff\0b"}, {"id": 2, "name": "box"}])
    usable = only_usable(raw)
    assert [entry["name"] for entry in usable.categories] == ["a??b", "box"]
    [problem] = usable.problems
    assert (problem.kind, problem.where) == ("bad-entry", "data.json: category 1")
    assert problem.message == "data.json: category 1 has name='a\\udcff\\x00b', which is not valid text; correct it."


@pytest.mark.parametrize(("text", "answer"), [("", True), ("é 日", True), (LONE, False), ("\0", False), ("a\0", False)])
def test_a_text_is_utf_8_without_zero_bytes(text, answer):
    assert is_text(text) is answer


@pytest.mark.parametrize(
    ("path", "answer"),
    [("https://a.b/c.jpg", True), ("zip://a.jpg::b.zip", True), ("a::b", True), ("C:/a.jpg", False), ("a:/b", False)],
)
def test_an_address_or_a_path_in_an_archive_is_told_by_its_marks(path, answer):
    assert is_address(path) is answer
