"""Listed names that several files have, empty label files called as a list, and numbers of YOLO that are not finite."""

import json
import os
from functools import partial

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from dino_hf.common.output_folders import is_leftover
from dino_hf.data import hub_files, load_data, read_raw
from dino_hf.doctor.checks import inspect

LINE = "0 0.5 0.5 0.25 0.4\n"
XML = (
    "<annotation><filename>x.png</filename><size><width>40</width><height>30</height></size><object><name>cat</name><bndbox>"
    "<xmin>4</xmin><ymin>3</ymin><xmax>14</xmax><ymax>15</ymax></bndbox></object></annotation>"
)


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def two_of_one_name(folder, layout):
    for number, name in enumerate(("cam/a/x.png", "cam/b/x.png", "cam/a/y.png")):
        image(folder / name, number)
    if layout == "coco":
        images = [{"id": i, "file_name": f"{n}.png", "width": 40, "height": 30} for i, n in enumerate("xy")]
        boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [4, 3, 10, 12]} for i in range(2)]
        images[0]["candidates"] = ["/etc/passwd"] * 2
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
        text(folder / "train.json", json.dumps(content))
    elif layout == "huggingface":
        rows = [{"file_name": f"{n}.png", "objects": {"bbox": [[4, 3, 10, 12]], "category": [0]}} for n in "xy"]
        text(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    else:
        for name in ("cam/a/x", "cam/b/x", "cam/a/y"):
            text(folder / f"{name}.{'xml' if layout == 'voc' else 'txt'}", XML if layout == "voc" else LINE)
        if layout == "yolo":
            text(folder / "classes.txt", "cat\n")
        text(folder / "train.txt", "x\ny\n" if layout == "voc" else "x.png\ny.png\n")


@pytest.mark.parametrize("layout", ["coco", "huggingface", "voc", "yolo"])
def test_a_name_of_two_files_is_ambiguous_and_both_are_named(tmp_path, layout):
    two_of_one_name(tmp_path, layout)
    ending = "xml" if layout == "voc" else "png"
    pattern = (
        rf"^'?x\b.* is ambiguous: 2 files have this name, such as .*cam/a/x\.{ending} and .*cam/b/x\.{ending}; list it"
    )
    with pytest.raises(FileNotFoundError, match=pattern):
        load_data(tmp_path)
    errors = [finding for finding in inspect(read_raw(tmp_path)).findings if finding.severity == "error"]
    assert any("is ambiguous: 2 files" in offender.value for finding in errors for offender in finding.offenders)


def test_a_json_cannot_tell_what_its_names_may_mean(tmp_path):
    two_of_one_name(tmp_path, "coco")
    (tmp_path / "cam/b/x.png").unlink()
    (tmp_path / "cam/a/x.png").unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_data(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", LINE])
def test_the_label_file_of_an_image_called_test_is_no_list(tmp_path, content):
    for number, name in enumerate(("test_1", "b", "c")):
        image(tmp_path / f"{name}.png", number)
        text(tmp_path / f"{name}.txt", LINE if number else content)
    text(tmp_path / "classes.txt", "cat\n")
    text(tmp_path / "train.txt", "b.png\nc.png\ntest_1.png\n")
    data = load_data(tmp_path, validation_fraction=0)
    assert data.test is None
    assert sorted(data.train.dataset["file_name"]) == ["b.png", "c.png", "test_1.png"]
    (tmp_path / "train.txt").unlink()
    assert not any("list" in note for note in load_data(tmp_path, validation_fraction=0).notes)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_numbers_of_yolo_that_are_not_finite_are_named_in_its_words(tmp_path, number):
    for place, name in enumerate("abc"):
        image(tmp_path / f"{name}.png", place)
        text(tmp_path / f"{name}.txt", LINE + (f"0 {number} 0.5 0.2 0.2\n" if name == "b" else ""))
    text(tmp_path / "classes.txt", "cat\n")
    with pytest.raises(
        ValueError, match=r"b\.txt, line 2 is .*has a number that is not finite; .*relative to the image"
    ):
        load_data(tmp_path)


def test_streams_of_killed_processes_are_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    closing = []
    monkeypatch.setattr(
        hub_files.atexit, "register", lambda *call, **options: closing.append(partial(*call, **options))
    )
    stream = Dataset.from_dict({"a": [1, 2, 3]}).to_iterable_dataset()
    assert hub_files.drain(stream)["a"][:] == [1, 2, 3]
    (folder,) = (tmp_path / "cache").iterdir()
    assert not is_leftover(folder)
    dead = folder.with_name(folder.name.replace(f"-{os.getpid()}-", "-999999999-"))
    assert dead != folder
    folder.rename(dead)
    again = hub_files.drain(stream)
    assert not dead.exists()
    del again
    for close in closing:
        close()
    assert not list((tmp_path / "cache").iterdir())
