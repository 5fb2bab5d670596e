"""COCO json files: splits, images and ids."""

import json

import pytest
from PIL import Image

from dino_hf.data import load_data, read_raw
from dino_hf.data.coco_format import KeyNumbers

CATEGORIES = [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}]


def content(*file_names, categories=CATEGORIES, category_id=4, **changes):
    """Images of 40x30 with a box each."""
    images = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(file_names, start=1)]
    annotations = [
        {"id": image["id"], "image_id": image["id"], "category_id": category_id, "bbox": [1, 2, 10, 12]}
        for image in images
    ]
    return {"images": images, "annotations": annotations, "categories": categories} | changes


def write(folder, jsons, images):
    for path, value in jsons.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(value if isinstance(value, str) else json.dumps(value))
    for path in images:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(folder / path)
    return folder


def found_images(raw, folder):
    return {
        name: [entry["path"].relative_to(folder).as_posix() for entry in split.images]
        for name, split in raw.splits.items()
    }


@pytest.mark.parametrize(
    ("json_file", "image", "file_name", "split"),
    [
        ("annotations/instances_train2017.json", "train2017/a.png", "a.png", "train"),
        ("annotations/instances_train2017.json", "images/train2017/a.png", "a.png", "train"),
        ("annotations/instances_val2017.json", "images/val/a.png", "a.png", "validation"),
        ("annotations/val.json", "valid/images/a.png", "a.png", "validation"),
        ("valid/_annotations.coco.json", "valid/a.png", "a.png", "validation"),
        ("train.json", "images/a.png", "a.png", "train"),
        ("train.json", "a.png", "a.png", "train"),
        ("labels/test/x.json", "deep/down/a.png", "/home/someone/images/a.png", "test"),
        ("annotations.json", "images/sub/a.png", "sub/a.png", "train"),
        ("annotations.json", "images/sub/a.png", "images\\sub\\a.png", "train"),
        ("result.json", "images/a.png", "../../label-studio/data/images/a.png", "train"),
    ],
)
def test_images_and_splits_are_found(json_file, image, file_name, split, tmp_path):
    folder = write(tmp_path / "data", {json_file: content(file_name)}, [image])
    assert found_images(read_raw(folder), folder) == {split: [image]}
    assert found_images(read_raw(folder / json_file), folder) == {split: [image]}
    assert read_raw(folder).splits[split].images[0]["file_name"] == file_name


def test_a_path_relative_to_the_working_directory_will_do(tmp_path, monkeypatch):
    write(tmp_path / "valid", {"_annotations.coco.json": content("a.png")}, ["a.png"])
    monkeypatch.chdir(tmp_path / "valid")
    for source in (".", "_annotations.coco.json"):
        assert found_images(read_raw(source), tmp_path) == {"validation": ["valid/a.png"]}


def test_images_of_one_name_are_never_taken_from_another_split(tmp_path):
    jsons = {f"annotations/{split}.json": content("a.png", "b.png") for split in ("train", "val")}
    folder = write(tmp_path, jsons, ["train/a.png", "train/b.png", "val/a.png"])
    assert found_images(read_raw(folder), folder)["train"] == ["train/a.png", "train/b.png"]
    with pytest.raises(
        FileNotFoundError, match=r"val.b\.png, listed in .*val\.json, does not exist\. `dino-hf doctor "
    ):
        load_data(folder)


def test_a_name_that_stands_for_two_files_finds_none(tmp_path):
    folder = write(tmp_path, {"annotations.json": content("a.png")}, ["one/a.png", "two/a.png"])
    assert not read_raw(folder).splits["train"].images[0]["path"].exists()


def test_other_jsons_are_passed_over(tmp_path):
    keypoints = content("a.png", categories=[{"id": 1, "name": "person"}])
    captions = {"images": keypoints["images"], "annotations": [{"id": 1, "image_id": 1, "caption": "A cat."}]}
    jsons = {
        "annotations/instances_train2017.json": content("a.png"),
        "annotations/person_keypoints_train2017.json": keypoints,
        "annotations/captions_train2017.json": captions,
        "annotations/image_info_test2017.json": content("c.png", annotations=[]),
        "annotations/image_info_test-dev2017.json": content("c.png", annotations=[]),
        "more/captions.json": captions,
        "config.json": {"images": 3},
        ".cache/x.json": content("a.png"),
    }
    folder = write(tmp_path, jsons, ["train2017/a.png"])
    raw = read_raw(folder)
    assert {name: split.origin.name for name, split in raw.splits.items()} == {
        "train": "instances_train2017.json",
        "test": "image_info_test2017.json",
        "annotations/image_info_test-dev2017": "image_info_test-dev2017.json",
    }
    assert raw.problems == []
    data = load_data(folder, validation_fraction=0)
    assert (data.validation, data.test) == (None, None)
    notes = " ".join(data.notes)
    assert "captions.json has images, but no boxes, and is skipped." in notes
    assert "no file of the test images exists, so there are no test data." in notes
    assert "skipped: annotations/image_info_test-dev2017." in notes


def test_test_data_need_neither_annotations_nor_categories(tmp_path):
    test = {"images": content("b.png")["images"], "categories": CATEGORIES}
    folder = write(tmp_path, {"train.json": content("a.png", "c.png"), "test.json": test}, ["a.png", "b.png", "c.png"])
    data = load_data(folder)
    assert [len(part.dataset) for part in data[:3]] == [1, 1, 1]
    assert data.test.dataset[0]["objects"]["bbox"] == []
    with pytest.raises(ValueError, match=r"train\.json is not in COCO format: it has no list of \['annotations'\]"):
        load_data(write(tmp_path / "other", {"train.json": test}, ["b.png"]))


def test_two_jsons_for_one_split_are_a_choice_of_the_user(tmp_path):
    folder = write(tmp_path, {"train_a.json": content("a.png"), "train_b.json": content("b.png")}, ["a.png", "b.png"])
    assert [problem.kind for problem in read_raw(folder).problems] == ["two-files-for-a-split"]
    with pytest.raises(ValueError, match=r"train_b\.json and .*train_a\.json both say 'train'; give"):
        load_data(folder)
    assert load_data(folder / "train_b.json", validation_fraction=0).train.dataset["file_name"][:] == ["b.png"]
    others = write(tmp_path / "others", {"one.json": content("a.png"), "two.json": content("a.png")}, ["a.png"])
    assert list(read_raw(others).splits) == ["one", "two"]
    with pytest.raises(
        ValueError, match=r"has the parts \['one', 'two'\], but none is named train, validation or test"
    ):
        load_data(others)


def test_splits_that_number_their_classes_otherwise_share_one_class_space(tmp_path):
    swapped = [{"id": 4, "name": "dog"}, {"id": 9, "name": "bird"}, {"id": 3, "name": "cat"}]
    valid = content("b.png", categories=swapped)
    valid["annotations"] += [valid["annotations"][0] | {"id": n, "category_id": n} for n in (9, 3)]
    folder = write(tmp_path, {"train.json": content("a.png"), "val.json": valid}, ["a.png", "b.png"])
    data = load_data(folder)
    assert data.train.id2label == {0: "cat", 1: "dog", 2: "bird"}
    assert data.train.category_ids == [4, 9, 10]
    assert data.validation.dataset[0]["objects"]["category"] == [1, 2, 0]
    assert any("changed by name: {4: 9, 9: 10, 3: 4}" in note for note in data.notes)


def test_a_split_may_have_fewer_classes_or_more(tmp_path):
    more = [*CATEGORIES[1:], {"id": 2, "name": "ant"}]
    jsons = {"train.json": content("a.png"), "val.json": content("b.png", categories=more, category_id=9)}
    data = load_data(write(tmp_path, jsons, ["a.png", "b.png"]))
    assert data.validation.id2label == data.train.id2label == {0: "ant", 1: "cat", 2: "dog"}
    assert data.train.category_ids == [2, 4, 9]
    assert data.validation.dataset[0]["objects"]["category"] == [2]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"annotations": [3]},
            "bad-entry",
            r"annotations\[0\] is 3; it must be an object with image_id and category_id and bbox",
        ),
        ({"images": ["a.png"]}, "bad-entry", "image 0 is 'a.png'; it must be an object with id and file_name"),
        (
            {"images": [{"id": 1, "width": 4}]},
            "bad-entry",
            "image 0 has file_name=None; it must be a text that is not empty",
        ),
        (
            {"categories": [{"id": True, "name": "cat"}]},
            "bad-entry",
            "category 0 has id=True; it must be a whole number or a text",
        ),
        (
            {"images": [{"id": 2**70, "file_name": "a.png"}]},
            "bad-entry",
            "image 0 has id=1180591620717411303424, which is more than 64 bits hold",
        ),
        ({"categories": None}, "missing-list", r"is not in COCO format: it has no list of \['categories'\]"),
        (
            {"annotations": [{"image_id": 1, "category_id": 4, "bbox": [1, 2, "3", 4]}]},
            "bad-entry",
            r"annotations\[0\] has bbox=\[1, 2, '3', 4\]; it must be",
        ),
        (
            {"annotations": [{"image_id": 1, "category_id": 4, "bbox": [1, 2, 3, 4], "area": "x"}]},
            "bad-entry",
            r"annotations\[0\] has area='x' and iscrowd=None; they must be a number, and 0 or 1",
        ),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_then_an_error(changes, kind, message, tmp_path):
    folder = write(tmp_path, {"train.json": content("a.png", **changes)}, ["a.png"])
    with pytest.raises(ValueError, match=rf"(?s)train\.json.*{message}.* `dino-hf doctor {folder}` lists all errors"):
        load_data(folder)
    problem = read_raw(folder).problems[0]
    assert (problem.kind, problem.message in str(problem)) == (kind, True)
    assert str(folder / "train.json") in problem.where


def test_a_broken_json_beside_others_is_a_problem(tmp_path):
    folder = write(tmp_path, {"train.json": content("a.png"), "val.json": "{"}, ["a.png"])
    assert [problem.kind for problem in read_raw(folder).problems] == ["unreadable-file"]
    with pytest.raises(ValueError, match=r"val\.json is not valid json: .* --fix writes a cleaned copy\.$"):
        load_data(folder)


@pytest.mark.parametrize(
    ("name", "supercategory", "is_left_out"),
    [("pets", "none", True), ("background", "none", True), ("N/A", "x", True), ("wolf", "pets", False)],
)
def test_only_an_unused_category_that_stands_for_background_is_left_out(name, supercategory, is_left_out, tmp_path):
    categories = [
        {"id": 0, "name": name, "supercategory": supercategory},
        *({**entry, "supercategory": "pets"} for entry in CATEGORIES),
    ]
    for folder, used in ((tmp_path / "unused", 4), (tmp_path / "used", 0)):
        write(folder, {"train.json": content("a.png", categories=categories, category_id=used)}, ["a.png"])
        data = load_data(folder, validation_fraction=0)
        expected = [4, 9] if is_left_out and used else [0, 4, 9]
        assert data.train.category_ids == expected
        assert read_raw(folder).categories == categories


@pytest.mark.parametrize(
    ("listed", "image"),
    [
        ("C:\\me\\a.png", "images/a.png"),
        ("a.png", "deep/A.PNG"),
        ("\u00e9.png", "deep/e\u0301.png"),
    ],
)
def test_names_from_other_computers_are_found(listed, image, tmp_path):
    write(tmp_path, {"labels.JSON": content(listed)}, [image, "pictures/a.png.png"])
    assert found_images(read_raw(tmp_path), tmp_path) == {"train": [image]}


def test_one_file_is_never_two_images(tmp_path):
    write(tmp_path, {"labels.json": content("cam1/1.png", "cam2/1.png")}, ["images/1.png", "images/2.png"])
    with pytest.raises(FileNotFoundError, match=r"cam1/1.png, listed in .*labels.json, does not exist"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("key", "number"),
    [
        (7, 7),
        (-3, -3),
        (0, 0),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (2**63, None),
        (-(2**63) - 1, None),
        (7.0, 7),
        (7.5, None),
        (True, None),
        (None, None),
        ("", None),
        ([7], None),
        ("12", 12),
        ("-12", -12),
        ("0", 0),
        ({"$oid": "12"}, 12),
        ({"$oid": "12", "name": "x"}, None),
    ],
)
def test_whole_numbers_and_their_texts_stay_and_other_values_are_no_keys(key, number):
    assert KeyNumbers([], "id").number(key) == number


def test_other_texts_are_numbered_after_the_largest_number_in_their_order():
    keys = KeyNumbers([{"id": "b"}, {"id": 4}, "no entry", {"id": "a"}, {"id": "b"}, {"id": {"$oid": "007"}}], "id")
    assert [keys.number(key) for key in ("b", "a", {"$oid": "007"}, "007", 4)] == [5, 6, 7, 7, 4]
    assert keys.notes("image ids") == [
        "image ids are texts such as 'b'. 3 are replaced by numbers, which start at 5.",
    ]


def test_without_numbers_texts_begin_at_1_and_huge_numbers_do_not_count():
    keys = KeyNumbers([{"name": "b", "id": 9}, {"name": 2**62}, {"name": "a"}], "name")
    assert [keys.number(key) for key in ("b", "a")] == [1, 2]
    below = KeyNumbers([{"id": 2**62 - 1}, {"id": "a"}], "id")
    assert below.number("a") == 2**62


def test_an_unknown_text_gets_a_negative_number_of_its_own():
    keys = KeyNumbers([{"id": "a"}], "id")
    unknown = [keys.number(key) for key in ("x", "y", "x")]
    assert unknown == [-(2**62) - 1, -(2**62) - 2, -(2**62) - 1]
    assert keys.notes("ids") == ["ids are texts such as 'a'. 1 are replaced by numbers, which start at 1."]


def test_numbers_need_no_note_and_a_long_text_is_cut():
    assert KeyNumbers([{"id": 3}, {"id": "4"}], "id").notes("ids") == []
    [note] = KeyNumbers([{"id": "n" * 41}], "id").notes("ids")
    assert note == f"ids are texts such as '{'n' * 40}'. 1 are replaced by numbers, which start at 1."


@pytest.mark.parametrize(
    ("text", "number"), [("9" * 18, int("9" * 18)), ("9" * 19, None), ("9" * 20, 41), ("01", 41), ("1 ", 41)]
)
def test_texts_of_numbers_have_no_leading_zero_and_19_digits_at_most(text, number):
    assert KeyNumbers([{"id": 40}, {"id": text}], "id").number(text) == number
