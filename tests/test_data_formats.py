"""One data set in the layouts that people have: all give the same rows, classes and inputs of the model."""

import datasets
import numpy as np
import pytest
import torch

from data_layouts import CATEGORY_IDS, LAYOUTS, NAMES, draw_splits, write_category_layout, write_layout
from dino_hf import DinoDetrImageProcessor
from dino_hf.data import canonical_split, load_data, read_raw
from dino_hf.training import DetectionCollator, DetectionTransform

# Boxes of YOLO are divided by the image's size and multiplied again: in pixels below 128, two roundings of 2**-53 each time.
TOLERANCE = 1e-12
FORMATS = {"roboflow-coco": "coco", "coco-flat": "coco", "roboflow-yolo": "yolo", "roboflow-voc": "voc"} | {
    "hub": "huggingface",
    "parquet": "huggingface",
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("scenes"), train=5, validation=4, test=3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows_by_name(data):
    """File name -> size and objects, in an order of their own."""
    rows = {}
    for row in data.dataset.remove_columns("image"):
        objects = row["objects"]
        fields = zip(objects["category"], objects["bbox"], objects["area"], objects["iscrowd"], strict=True)
        rows[row["file_name"].split("/")[-1]] = (row["width"], row["height"], list(fields))
    return rows


def check_rows(data, scenes):
    rows = rows_by_name(data)
    assert set(rows) == {scene.path.name for scene in scenes}
    for scene in scenes:
        width, height, objects = rows[scene.path.name]
        assert (width, height) == (scene.width, scene.height)
        assert [category for category, *_ in objects] == [NAMES.index(name) for name, _ in scene.objects]
        assert [iscrowd for *_, iscrowd in objects] == [0] * len(scene.objects)
        boxes = np.array([bbox for _, bbox in scene.objects], dtype=float).reshape(-1, 4)
        found = np.array([bbox for _, bbox, *_ in objects]).reshape(-1, 4)
        np.testing.assert_allclose(found, boxes, rtol=0, atol=TOLERANCE)
        areas = [area for _, _, area, _ in objects]
        np.testing.assert_allclose(areas, boxes[:, 2:].prod(1), rtol=TOLERANCE)


def check_inputs(data, scenes):
    """What the model gets: pixels and boxes of each image."""
    transform = DetectionTransform(DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}))
    dataset = data.dataset.with_transform(transform)
    samples = [dataset[index] for index in range(len(dataset))]
    counts = {scene.path.name: len(scene.objects) for scene in scenes}
    names = [name.split("/")[-1] for name in data.dataset["file_name"]]
    assert [len(sample["labels"]["boxes"]) for sample in samples] == [counts[name] for name in names]
    assert DetectionCollator()(samples)["pixel_values"].shape[0] == len(scenes)
    return dict(zip(names, samples, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("cache")
def test_every_layout_gives_the_same_data(layout, splits, tmp_path):
    source = write_layout(layout, splits, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    data = load_data(source)
    assert data.notes[0].endswith(f"is read in {FORMATS.get(layout, layout)} format.")
    assert data.train.id2label == dict(enumerate(NAMES))
    first = 0 if FORMATS.get(layout, layout) in ("yolo", "huggingface") else 1
    assert data.train.category_ids == list(range(first, first + len(NAMES)))
    for name, scenes in splits.items():
        part = getattr(data, name)
        assert (part.id2label, part.category_ids) == (data.train.id2label, data.train.category_ids)
        assert part.name.endswith(name)
        assert len(set(part.dataset["image_id"])) == len(scenes)
        check_rows(part, scenes)
    samples = check_inputs(data.validation, splits["validation"])
    expected = load_data(write_layout("coco", splits, tmp_path / "expected")).validation
    for name, sample in check_inputs(expected, splits["validation"]).items():
        assert torch.equal(sample["pixel_values"], samples[name]["pixel_values"])
        # float32, of boxes that may differ by TOLERANCE
        torch.testing.assert_close(sample["labels"]["boxes"], samples[name]["labels"]["boxes"], rtol=0, atol=1e-6)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


@pytest.mark.parametrize("name", CATEGORY_IDS)
def test_every_layout_of_category_ids_gives_the_same_classes(name, splits, tmp_path):
    data = load_data(write_category_layout(name, splits, tmp_path / "data"))
    ids = CATEGORY_IDS[name] or list(range(1, 1 + len(NAMES)))
    for part, scenes in splits.items():
        found = getattr(data, part)
        assert found.id2label == dict(enumerate(NAMES))
        assert found.category_ids == ids
        check_rows(found, scenes)
    left_out = [note for note in data.notes if "left out" in note]
    assert left_out == (
        ["Category 0, 'shapes', has no objects and means background, so it is left out."]
        if name == "background"
        else []
    )


def test_raw_data_say_where_every_annotation_stands(splits, tmp_path):
    patterns = {
        "coco": "annotations[0]",
        "yolo": "train/train_000001.txt, line 1",
        "voc": "Annotations/train_000001.xml, object 0",
        "hub": "row 0, object 0",
    }
    for layout, where in patterns.items():
        raw = read_raw(write_layout(layout, splits, tmp_path / layout))
        assert list(raw.splits) == ["train", "validation", "test"]
        assert raw.splits["train"].annotations[0]["where"] == where
        assert raw.problems == []
        assert all(("path" in entry) != ("image" in entry) for entry in raw.splits["test"].images)


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *(("train2017", "train"), ("Training", "train"), ("test2017", "test"), ("val2017", "validation")),
        *(("valid", "validation"), ("dev", "validation"), ("minival", "validation")),
        *(("holiday", "holiday"), ("a7", "a7")),
    ],
)
def test_the_usual_words_for_splits(word, split):
    assert canonical_split(word) == split


def test_what_is_no_data_set_is_said_with_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*missing\.json\.$"):
        read_raw(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"is not a data set: it needs a json in COCO format.*; it has nothing\."):
        read_raw(tmp_path)
    for index in range(10):
        (tmp_path / f"{index}.jpg").touch()
    with pytest.raises(ValueError, match=r"it has 0\.jpg, 1\.jpg, .*7\.jpg and 2 more\."):
        read_raw(tmp_path)
    with pytest.raises(ValueError, match=r"0\.jpg is not a data set; give a folder, or a json"):
        read_raw(tmp_path / "0.jpg")
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(ValueError, match=r"annotations\.json is not valid json"):
        read_raw(tmp_path)


def test_box_format_is_for_data_that_do_not_tell_it(splits, tmp_path):
    with pytest.raises(ValueError, match="is in voc format, which defines the layout of boxes; leave box_format out"):
        load_data(write_layout("voc", splits, tmp_path / "voc"), box_format="xyxy")
