"""Which names tell a split, and that a name which merely has the word in it moves no image to another part."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value

from data_layouts import NAMES, coco_content, draw_splits
from dino_hf.data import load_data, read_raw
from dino_hf.data.file_names import SplitNames, is_plain, split_in


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("Training", "train"), ("train2017", "train"), ("training_set", "train")),
        *(("instances_train2017", "train"), ("train-00000-of-00012-a09b74b3ef9c3b56", "train"), ("obj_train_data", "train")),
        *(("train[:80%]", "train"), ("train_640x480", "train"), ("trainval2012", "train"), ("images-train (1)", "train")),
        *(("valid", "validation"), ("val_images", "validation"), ("person_keypoints", None), ("dev", "validation")),
        *(("test-dev2017", "test"), ("image_info_test-dev2017", "test"), ("testing", "test"), ("test.coco", "test")),
        *(("test_tube", None), ("training_day", None), ("validated", None), ("evaluation_of_x", None), ("crash_test", None)),
        *(("train_station", None), ("dev_board", None), ("val_thorens", None), ("bullet-train", None), ("latest", None)),
        *(("contest", None), ("trains", None), ("trainers", None), ("development_kit", None), ("tested", None)),
        *(("train_val", None), ("2017", None), ("", None)),
    ],
)  # fmt: skip
def test_only_a_name_of_plain_words_tells_a_split(name, split):
    assert split_in(name) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("raccoon_val", "validation"),
        ("lvis_v1_train", "train"),
        ("person_keypoints_val2017", "validation"),
        ("test_tube", None),
    ],
)
def test_the_last_word_of_a_list_of_annotations_tells_its_split(name, split):
    assert split_in(name, at_end=True) == split


def split_names(*paths, files_name_splits=False):
    root = Path("data")
    names = SplitNames(root, [root / path for path in paths], files_name_splits)
    return names, [names.split_of_file(root / path) for path in paths]


def test_names_that_differ_only_in_the_split_tell_it():
    names, told = split_names("wider_train/a/1.jpg", "wider_val/a/1.jpg", "test_tube/1.jpg")
    assert told == ["train", "validation", None]
    assert len(names.notes()) == 1
    assert "data/test_tube is not taken as test data" in names.notes()[0]


def test_a_last_word_beside_folders_of_splits_tells_it():
    assert split_names("train/1.jpg", "raccoon_val/1.jpg")[1] == ["train", "validation"]
    assert split_names("train/1.jpg", "test_tube/1.jpg")[1] == ["train", None]
    assert split_names("beaker/1.jpg", "crash_test/1.jpg")[1] == [None, None]
    # inside of a split the nearest folder that tells one counts
    assert split_names("train/crash_test/1.jpg", "test/training_day/1.jpg")[1] == ["train", "test"]


def test_names_of_images_tell_nothing_and_those_of_annotations_do():
    assert split_names("train_1.jpg", "test_1.jpg")[1] == [None, None]
    assert split_names("train_a.json", "test_a.json", files_name_splits=True)[1] == ["train", "test"]
    assert split_names("val/boxes.json", "bus_test.json", files_name_splits=True)[1] == ["validation", "test"]


@pytest.mark.parametrize(("name", "plain"), [("annotations_trainval2017", True), ("labels_of_wine", False)])
def test_a_plain_name_does_not_say_what_the_pictures_show(name, plain):
    assert is_plain(name) is plain


TRAPS = ("test_tube", "training_day", "validated", "evaluation_of_x", "crash_test", "val_thorens", "dev_board")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("scenes"), train=8)["train"]


def write_coco(scenes, folder):
    for scene in scenes:
        shutil.copy(scene.path, folder / scene.path.name)
    (folder / "_annotations.coco.json").write_text(json.dumps(coco_content(scenes)))


def write_voc(scenes, folder):
    for scene in scenes:
        shutil.copy(scene.path, folder / scene.path.name)
        boxes = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
            "</object>"
            for name, (x, y, w, h) in scene.objects
        )
        (folder / f"{scene.path.stem}.xml").write_text(
            f"<annotation><filename>{scene.path.name}</filename><size><width>{scene.width}</width><height>{scene.height}</height>"
            f"</size>{boxes}</annotation>"
        )


def write_yolo(scenes, folder):
    (folder.parent / "classes.txt").write_text("\n".join(NAMES))
    for scene in scenes:
        shutil.copy(scene.path, folder / scene.path.name)
        lines = [
            f"{NAMES.index(name)} {(x + w / 2) / scene.width} {(y + h / 2) / scene.height} {w / scene.width} {h / scene.height}"
            for name, (x, y, w, h) in scene.objects
        ]
        (folder / f"{scene.path.stem}.txt").write_text("\n".join(lines))


def write_jsonl(scenes, folder):
    rows = []
    for scene in scenes:
        shutil.copy(scene.path, folder / scene.path.name)
        boxes = {
            "bbox": [box for _, box in scene.objects],
            "category": [NAMES.index(name) for name, _ in scene.objects],
        }
        rows.append({"file_name": scene.path.name, "objects": boxes})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_parquet(scenes, folder):
    objects = {"bbox": List(List(Value("float64"), length=4)), "category": List(Value("int64"))}
    rows = [
        {
            "image": {"path": None, "bytes": scene.path.read_bytes()},
            "objects": {
                "bbox": [box for _, box in scene.objects],
                "category": [NAMES.index(name) for name, _ in scene.objects],
            },
        }
        for scene in scenes
    ]
    Dataset.from_list(rows, features=Features({"image": Image(), "objects": objects})).to_parquet(
        folder / "part.parquet"
    )


WRITERS = {"voc": write_voc, "yolo": write_yolo, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.usefixtures("cache")
def test_folders_named_for_what_they_show_are_all_trained_on(layout, scenes, tmp_path):
    source = tmp_path / "data"
    for trap, scene in zip(TRAPS, (scene for scene in scenes if scene.objects), strict=False):
        (source / trap).mkdir(parents=True)
        WRITERS[layout]([scene], source / trap)
    raw = read_raw(source)
    assert {name: len(split.images) for name, split in raw.splits.items()} == {"train": len(TRAPS)}
    assert any("is not taken as" in note for note in raw.notes)
    assert raw.problems == []


@pytest.mark.parametrize("trap", TRAPS)
def test_a_coco_json_in_a_folder_named_for_what_it_shows_is_trained_on(trap, scenes, tmp_path):
    (tmp_path / "data" / trap).mkdir(parents=True)
    write_coco(scenes, tmp_path / "data" / trap)
    assert list(read_raw(tmp_path / "data").splits) == ["train"]
    data = load_data(tmp_path / "data", validation_fraction=0.25)
    assert data.test is None
    assert len(data.train.dataset) + len(data.validation.dataset) == len(scenes)


def test_a_json_finds_its_images_in_a_folder_with_the_word_of_another_split(scenes, tmp_path):
    (tmp_path / "test_tube").mkdir()
    for scene in scenes:
        shutil.copy(scene.path, tmp_path / "test_tube" / scene.path.name)
    (tmp_path / "train.json").write_text(json.dumps(coco_content(scenes)))
    assert len(load_data(tmp_path, validation_fraction=0).train.dataset) == len(scenes)


def test_only_a_plain_folder_of_labels_widens_the_search_to_the_folder_above(scenes, tmp_path):
    for folder, found in (("annotations", True), ("labels_2017", True), ("labels_of_wine", False)):
        root = tmp_path / f"of_{folder}"
        (root / folder).mkdir(parents=True)
        (root / "photos").mkdir()
        for scene in scenes:
            shutil.copy(scene.path, root / "photos" / scene.path.name)
        (root / folder / "boxes.json").write_text(json.dumps(coco_content(scenes)))
        problems = read_raw(root / folder / "boxes.json").problems
        images = read_raw(root / folder / "boxes.json").splits["train"].images
        assert all(entry["path"].is_file() for entry in images) is found, problems
