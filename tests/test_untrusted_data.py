"""Data sets of strangers, and of other computers: what is read, what is refused in one sentence, and what is found."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from dino_hf.data import load_data, read_raw
from dino_hf.data.raw import Problem
from dino_hf.doctor.checks import inspect

XML = (
    "<annotation><filename>{}</filename><size><width>40</width><height>30</height></size><object><name>{}</name><bndbox>"
    "<xmin>4</xmin><ymin>3</ymin><xmax>14</xmax><ymax>15</ymax></bndbox></object></annotation>"
)
LINE = "0 0.5 0.5 0.25 0.4\n"


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def coco(folder, names, json_file="train.json", first=1, change=lambda content: None):
    ids = range(first, first + len(names))
    content = {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in zip(ids, names, strict=True)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [4, 3, 10, 12], "iscrowd": 0} for i in ids],
        "categories": [{"id": 1, "name": "cat"}],
    }
    change(content)
    text(folder / json_file, json.dumps(content))
    return folder


def found(folder):
    """Listed name -> path below the folder, or None if it is missing."""
    entries = [entry for split in read_raw(folder).splits.values() for entry in split.images]
    return {
        entry["file_name"]: entry["path"].relative_to(folder).as_posix() if entry["path"].is_file() else None
        for entry in entries
    }


def kinds(raw):
    return [problem.kind for problem in raw.problems]


@pytest.mark.parametrize("first", [["video2/1.jpg"], []])
def test_frames_of_another_video_are_never_taken(first, tmp_path):
    image(tmp_path / "images/video1/1.jpg")
    coco(tmp_path, [*first, "video1/1.jpg"])
    if not first:
        coco(tmp_path, ["video2/1.jpg"], "val.json", 9)
    assert found(tmp_path) == {"video1/1.jpg": "images/video1/1.jpg", "video2/1.jpg": None}


@pytest.mark.parametrize(
    ("images", "prefix"),
    [
        ("images/default", ""),
        ("data", ""),
        ("images", "project/images/"),
        ("images", "/home/someone/images/"),
        ("images", "C:\\someone\\images\\"),
    ],
)
def test_the_end_of_a_path_finds_images(images, prefix, tmp_path):
    names = ["cam1/1.jpg", "cam2/1.jpg"]
    for name in names:
        image(tmp_path / images / name)
    coco(tmp_path, [prefix + name for name in names], "annotations/instances_default.json")
    assert found(tmp_path) == {prefix + name: f"{images}/{name}" for name in names}


@pytest.mark.parametrize(
    ("xml", "picture", "is_there"),
    [
        ("annotations/xmls/a.xml", "images/a.jpg", True),
        ("annotations/train/a.xml", "images/a.jpg", True),
        ("cam1/xml/a.xml", "cam1/images/a.jpg", True),
        ("cam1/xml/a.xml", "images/a.jpg", False),  # may be of another camera
    ],
)
def test_an_image_of_an_xml_may_lie_beside_the_folders_above(xml, picture, is_there, tmp_path):
    image(tmp_path / picture)
    text(tmp_path / xml, XML.format("a.jpg", "cat"))
    assert (None not in found(tmp_path).values()) == is_there


def test_the_inner_one_of_two_nested_exports_reads_its_own_images(tmp_path):
    for folder in (tmp_path, tmp_path / "inner"):
        image(folder / "train/images/1.png")
        text(folder / "train/labels/1.txt", LINE)
        text(folder / "data.yaml", "train: ../train/images\nnames: [cat]\n")
    for folder in (tmp_path, tmp_path / "inner"):
        (entry,) = read_raw(folder).splits["train"].images
        assert entry["path"] == folder / "train/images/1.png"


def test_a_mask_does_not_share_the_boxes_of_its_photo(tmp_path):
    for name in ("1.jpg", "1.png", "2.png"):
        image(tmp_path / "images" / name)
    text(tmp_path / "labels/1.txt", LINE)
    text(tmp_path / "data.yaml", "train: images\nnames: [cat]\n")
    raw = read_raw(tmp_path)
    assert [entry["path"].name for entry in raw.splits["train"].images] == ["1.jpg", "2.png"]
    assert any("1.png" in note and "masks" in note for note in raw.notes)


def yolo(folder, images="images"):
    for number in range(4):
        image(folder / images / f"{number}.png", number)
        text(folder / images.replace("images", "labels") / f"{number}.txt", LINE)


def voc(folder, prefix=""):
    for number in range(4):
        image(folder / f"JPEGImages/{prefix}{number}.png", number)
        text(folder / f"Annotations/{prefix}{number}.xml", XML.format(f"{number}.png", "cat"))


@pytest.mark.parametrize(
    ("layout", "prefix", "lists", "line"),
    [
        ("yolo", "", ("train.txt", "val.txt"), "images/{}.png"),
        ("yolo", "", ("train.txt", "test.txt"), "data/images/{}.png"),  # of obj.data
        ("voc", "", ("ImageSets/Main/Train.txt", "ImageSets/Main/Validation.txt"), "{}"),
        ("voc", "", ("ImageSets/train.txt", "ImageSets/valid.txt"), "{}"),
        ("voc", "", ("ImageSets/Split1/train.txt", "ImageSets/Split1/val.txt"), "{}"),
        ("voc", "cam1/", ("ImageSets/Main/train.txt", "ImageSets/Main/val.txt"), "cam1/{}"),
        ("voc", "", ("train_list.txt", "val_list.txt"), "JPEGImages/{0}.png Annotations/{0}.xml"),
    ],
)
def test_split_lists_are_used(layout, prefix, lists, line, tmp_path):
    if layout == "yolo":
        yolo(tmp_path)
        text(tmp_path / "obj.names", "cat\n")
        if lists[1] == "test.txt":
            text(tmp_path / "obj.data", "train = data/train.txt\nvalid = data/test.txt\n")
    else:
        voc(tmp_path, prefix)
    for name, numbers in zip(lists, ((0, 1), (2,)), strict=True):
        text(tmp_path / name, "".join(f"{line.format(number)}\n" for number in numbers))
    raw = read_raw(tmp_path)
    stems = {name: [entry["path"].stem for entry in split.images] for name, split in raw.splits.items()}
    assert stems == {"train": ["0", "1"], "validation": ["2"]}
    assert any("in no list" in note for note in raw.notes)  # number 3


def test_images_without_xml_and_photos_that_are_not_read_are_told(tmp_path):
    voc(tmp_path)
    image(tmp_path / "JPEGImages/more.png")
    (tmp_path / "JPEGImages/phone.HEIC").touch()
    notes = " ".join(read_raw(tmp_path).notes)
    assert "1 images have no xml and are skipped" in notes
    assert "1 file is skipped, because this format is not supported" in notes
    assert "phone.HEIC" in notes


def test_an_xml_in_a_chinese_encoding_is_read(tmp_path):
    image(tmp_path / "a.jpg")
    content = '<?xml version="1.0" encoding="gbk"?>' + XML.format("a.jpg", "\u732b")
    (tmp_path / "a.xml").write_bytes(content.encode("gbk"))
    assert [entry["name"] for entry in read_raw(tmp_path).categories] == ["\u732b"]


@pytest.mark.parametrize(
    "as_id", [str, lambda number: {"$oid": f"5f{number}"}, lambda number: f"img-{number}", lambda number: float(number)]
)
def test_ids_may_be_texts(as_id, tmp_path):
    def change(content):
        for entry in content["images"]:
            entry["id"] = as_id(entry["id"])
        for entry in content["annotations"]:
            entry["id"], entry["image_id"] = {"$oid": "5f"}, as_id(entry["image_id"])
        content["categories"][0]["supercategory"] = ["pets"]

    names = ["1.png", "2.png"]
    for name in names:
        image(tmp_path / name)
    data = load_data(coco(tmp_path, names, change=change), validation_fraction=0)
    assert [len(objects["bbox"]) for objects in data.train.dataset["objects"]] == [1, 1]
    inspect(read_raw(tmp_path), check_images=False)


def test_the_root_category_may_have_the_name_of_the_only_class(tmp_path):
    def change(content):
        root = {"id": 0, "name": "cat", "supercategory": "none"}
        content["categories"] = [root, {"id": 1, "name": "cat", "supercategory": "cat"}]

    for name in ("1.png", "2.png"):
        image(tmp_path / name)
    data = load_data(coco(tmp_path, ["1.png", "2.png"], change=change), validation_fraction=0)
    assert (data.train.id2label, data.train.category_ids) == ({0: "cat"}, [1])


@pytest.mark.parametrize("nc", ["99999999", "1000000000000", "9" * 5000, "100001"])
def test_a_number_of_classes_is_bounded(nc, tmp_path):
    image(tmp_path / "images/1.png")
    text(tmp_path / "data.yaml", f"train: images\nnc: {nc}\n")
    with pytest.raises(ValueError, match="it must be the number of classes, at most 100,000"):
        load_data(tmp_path)
    text(tmp_path / "data.yaml", "train: images\nnc: 100000\n")
    assert len(read_raw(tmp_path).categories) == 100_000


_WHY = {
    "a\0": r"'a.x00b.png', whose name is not usable, because it has a zero byte; rename",
    "\ud800.": "whose name is not valid UTF-8; rename",
    "aa": "does not exist",
    "/d": "does not exist|outside of the data set's folder",
    "..": "outside of the data set's folder",
}


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png", "a" * 300 + ".png", "/dev/zero", "../secret.png"])
def test_a_name_that_may_not_be_read_is_one_problem_and_the_rest_is_looked_at(name, tmp_path):
    image(tmp_path / "secret.png")
    image(tmp_path / "data/2.png")
    folder = coco(tmp_path / "data", [name, "2.png"])
    raw = read_raw(folder)
    report = inspect(raw, check_images=False)
    assert json.dumps(report.as_dict(), ensure_ascii=False).encode()
    assert report.has_errors
    if name == "../secret.png":
        assert kinds(raw) == ["outside"]
        assert [entry["file_name"] for entry in raw.splits["train"].images] == ["2.png"]
        assert len(raw.splits["train"].annotations) == 1
        assert load_data(folder, validation_fraction=0, allow_outside=True).train.dataset["file_name"][:] == [
            name,
            "2.png",
        ]
    with pytest.raises((ValueError, OSError), match=_WHY[name[:2]]):
        load_data(folder)


def test_a_class_name_that_is_no_text_is_a_problem(tmp_path):
    image(tmp_path / "1.png")
    raw = read_raw(coco(tmp_path, ["1.png"], change=lambda content: content["categories"][0].update(name="\ud800cat")))
    assert (kinds(raw), raw.categories[0]["name"]) == (["bad-entry"], "?cat")


def test_a_label_that_links_to_a_private_text_is_not_read(tmp_path):
    text(tmp_path / "secret.txt", "password 1234\n")
    folder = tmp_path / "data"
    yolo(folder)
    text(folder / "data.yaml", "train: images\nnames: [cat]\n")
    (folder / "labels/0.txt").unlink()
    (folder / "labels/0.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "images/1.png").unlink()
    (folder / "images/1.png").symlink_to(image(tmp_path / "secret.png"))
    raw = read_raw(folder)
    assert [entry["path"].name for entry in raw.splits["train"].images] == ["2.png", "3.png"]
    assert "outside" in kinds(raw)
    assert "password" not in str(raw)
    assert "secret.png" not in str([entry["path"] for entry in raw.splits["train"].images])


@pytest.mark.parametrize("name", ["x.yaml", "x.xml", "x.json", "x.parquet", "images/x.png", "labels/0.txt"])
def test_pipes_and_devices_stop_nothing(name, tmp_path):
    yolo(tmp_path)
    text(tmp_path / "classes.txt", "cat\n")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert len(read_raw(tmp_path).splits["train"].images) == 4


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.png", "hf://datasets/a/b/c.png", "zip://a.png::b.zip"])
def test_addresses_in_data_are_never_asked(address, tmp_path):
    kinds_of = {"category": List(Value("string")), "bbox": List(List(Value("float64")))}
    schema = Features({"image": ImageFeature(), "objects": kinds_of}).arrow_schema
    rows = {"image": [{"bytes": None, "path": address}], "objects": [{"category": ["cat"], "bbox": [[4.0, 3, 10, 12]]}]}
    table = pa.table({name: pa.array(rows[name], schema.field(name).type) for name in rows})
    pq.write_table(table.replace_schema_metadata(schema.metadata), tmp_path / "train.parquet")
    for source in (tmp_path, Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache"))):
        raw = read_raw(source)
        assert raw.splits["train"].images == []
        with pytest.raises(ValueError, match="URLs in data are never opened"):
            load_data(source)


def test_a_line_of_json_that_would_crash_its_reader_is_one_sentence(tmp_path):
    text(tmp_path / "train.jsonl", json.dumps({"file_name": "a.png"}) + "\n" + '{"a":' + "[" * 900 + "]" * 900 + "}\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2, is not usable json: .* nested"):
        read_raw(tmp_path)


def test_problems_are_sentences_of_bounded_length(tmp_path):
    image(tmp_path / "1.png")
    raw = read_raw(coco(tmp_path, ["1.png"], change=lambda c: c["annotations"][0].update(bbox=[[0] * 10**5] * 4)))
    assert all(isinstance(problem, Problem) and len(problem.message) < 1000 for problem in raw.problems)
    assert kinds(raw) == ["bad-entry"]
