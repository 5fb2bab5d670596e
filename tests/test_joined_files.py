"""Several files of one split: rows without boxes, more columns and other kinds of numbers do not keep them apart."""

import json

import pytest
from PIL import Image

from dino_hf.data import load_data

FULL = {"bbox": [[5.0, 6.0, 20.0, 15.5]], "category": [3]}
EMPTY = {"bbox": [], "category": []}
WHOLE = {"bbox": [[5, 6, 20, 15]], "category": [1]}


def write(folder, objects, **columns):
    folder.mkdir(parents=True)
    lines = []
    for number, entry in enumerate(objects):
        name = f"{folder.name}{number}.png"
        Image.new("RGB", (90, 60), (9 * number, 50, 80)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "objects": entry, **columns}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("first", [[FULL, FULL], [EMPTY, EMPTY], [WHOLE, EMPTY]], ids=["full", "empty", "whole"])
@pytest.mark.parametrize("second", [[FULL, FULL], [EMPTY, EMPTY]], ids=["full", "empty"])
def test_files_of_one_split_are_joined(tmp_path, first, second):
    write(tmp_path / "train/a", first, note="x", when=3)
    write(tmp_path / "train/b", second, when="late")
    boxes = [entry for entry in first + second if entry["bbox"]]
    if not boxes:
        with pytest.raises(ValueError, match="none of its 4 images has a box, so there are no classes; annotate some"):
            load_data(tmp_path)
        return
    rows = load_data(tmp_path, validation_fraction=0).train.dataset
    assert [objects["bbox"] for objects in rows["objects"]] == [entry["bbox"] for entry in first + second]
    assert len(rows) == 4


@pytest.mark.parametrize(
    "other",
    [{"bbox": [[5, 6, 7, 8]], "category": ["cat"]}, {"bbox": [[5, 6, 7, 8]], "category": [1], "iscrowd": [1]}],
    ids=["names", "crowds"],
)
def test_files_that_mean_other_things_are_refused(tmp_path, other):
    write(tmp_path / "train/a", [FULL, FULL])
    write(tmp_path / "train/b", [other, other])
    with pytest.raises(
        ValueError, match=r"a.metadata.jsonl and .*b.metadata.jsonl both have train data, with images, boxes"
    ):
        load_data(tmp_path)
