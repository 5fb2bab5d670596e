"""Classes of a detector and of data together, and detections of the old detector as annotations."""

from types import SimpleNamespace

import numpy as np
import pytest

from data_layouts import draw_splits, write_hub
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.data import load_data
from dino_hf.data.rows import CocoData
from dino_hf.inference.predictor import Detections
from dino_hf.training import load_coco
from dino_hf.training.kept_classes import (
    ClassGroups,
    add_boxes,
    boxes_to_add,
    count_boxes,
    keep_classes,
    select_classes,
)


def config(names, category_ids=None):
    return SimpleNamespace(id2label=dict(enumerate(names)), category_ids=category_ids)


def data_of(names, category_ids):
    return CocoData(None, dict(enumerate(names)), category_ids)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> CocoData:
    path = make_scenes(tmp_path_factory.mktemp("scenes") / "train", 12, seed=3)
    return load_coco(path, path.parent)


def test_old_classes_come_first_and_keep_names_and_ids():
    classes = keep_classes(config(["cat", "N/A", "dog"], [9, 1, 4]), data_of(["bird", "otter", "lynx"], [4, 30, 9]))
    assert classes.id2label == {0: "cat", 1: "dog", 2: "bird", 3: "otter", 4: "lynx"}
    assert classes.category_ids == [9, 4, 31, 30, 32]  # taken ids are replaced by the next numbers above all
    assert classes.renumbered == {"bird": 31, "lynx": 32}
    assert classes.places == [2, 3, 4]
    assert classes.old_places == {0: 0, 2: 1}
    assert (classes.old, classes.shared, classes.new) == (["cat", "dog"], [], ["bird", "otter", "lynx"])
    assert classes.groups == ClassGroups(["cat", "dog"], ["bird", "otter", "lynx"])


def test_an_annotated_old_class_is_known_by_its_synonym():
    classes = keep_classes(config(["couch", "tv", "cat"]), data_of(["sofa", "television", "TV", "otter"], [1, 2, 3, 7]))
    assert classes.id2label == {0: "couch", 1: "tv", 2: "cat", 3: "TV", 4: "otter"}
    assert classes.places == [0, 1, 3, 4]
    assert classes.category_ids == [0, 1, 2, 3, 7]  # without ids of its own, the detector has its class indices
    assert classes.old_places == {2: 2}
    assert (classes.shared, classes.new) == (["couch", "tv"], ["TV", "otter"])
    exact = keep_classes(config(["tv"]), data_of(["television", "tv"], [1, 2]))
    assert exact.places == [1, 0]


def test_classes_without_names_cannot_be_kept():
    with pytest.raises(ValueError, match=r"LABEL_0.*config\.json \(id2label\)"):
        keep_classes(config(["LABEL_0", "LABEL_1"]), data_of(["cat"], [1]))


def test_detections_that_overlap_are_left_out():
    boxes = [
        (10.0, 10.0, 30.0, 40.0),  # the best one
        (11.0, 10.0, 31.0, 40.0),  # the same object as another class
        (50.0, 10.0, 60.0, 30.0),  # annotated
        (52.0, 20.0, 68.0, 38.0),  # overlaps the annotation a little
        (-9.0, -5.0, 8.0, 7.0),  # extends beyond the image
        (89.7, 10.0, 130.0, 30.0),  # less than a pixel is inside
        (70.0, 40.0, 80.0, 55.0),  # a class that the data annotate
        (70.0, 40.0, 80.0, 55.0),  # a low score
    ]
    scores = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.3]
    found = Detections(np.array(boxes), np.array(scores), np.array([0, 2, 0, 2, 2, 0, 1, 0]))
    added, num_left_out = boxes_to_add(found, [(50.0, 11.0, 10.0, 19.0)], (90, 60), {0: 3, 2: 5}, {0: 0.3, 2: 0.6})
    assert [(label, score) for label, _, score in added] == [(3, 0.95), (5, 0.8), (5, 0.75)]
    assert [box for _, box, _ in added] == [[10, 10, 20, 30], [52, 20, 16, 18], [0, 0, 8, 7]]
    assert num_left_out == 2
    assert boxes_to_add(found.keep(np.zeros(8, dtype=bool)), [], (90, 60), {0: 3}, {0: 0.3}) == ([], 0)


def test_boxes_are_added_to_a_selection_of_images(scenes):
    part = scenes._replace(dataset=scenes.dataset.select([7, 2, 5]))
    classes = keep_classes(config(["cat", "ring"], [1, 2]), scenes)
    ids = part.dataset["image_id"]
    boxes = {ids[0]: [(0, [1.0, 2.0, 8.0, 4.0], 0.9)], ids[2]: [(0, [3.0, 3.0, 5.0, 6.0], 0.5)] * 2, 99: []}
    wide = add_boxes(part, classes, boxes)
    assert wide.id2label == {0: "cat", 1: "ring", 2: "disc", 3: "box", 4: "triangle", 5: "star"}
    assert wide.dataset["image_id"] == ids
    for before, after in zip(part.dataset, wide.dataset, strict=True):
        assert np.array_equal(before["image"], after["image"])
        own, added = before["objects"], boxes.get(before["image_id"], [])
        names = [scenes.id2label[category] for category in own["category"]] + ["cat"] * len(added)
        assert [wide.id2label[category] for category in after["objects"]["category"]] == names
        assert after["objects"]["bbox"] == own["bbox"] + [box for _, box, _ in added]
        assert after["objects"]["area"] == own["area"] + [box[2] * box[3] for _, box, _ in added]
        assert after["objects"]["iscrowd"] == own["iscrowd"] + [0] * len(added)
    alone = add_boxes(part, classes, boxes, with_annotations=False)
    assert [len(objects["category"]) for objects in alone.dataset["objects"]] == [1, 0, 2]
    assert count_boxes(classes, boxes) == {"cat": 3}


def test_boxes_are_added_to_images_in_a_table(tmp_path):
    """The images are bytes in the table, and the validation part is a selection of its rows."""
    splits = draw_splits(tmp_path / "drawn", train=7, validation=0)
    write_hub({"train": splits["train"]}, tmp_path / "hub")
    data = load_data(tmp_path / "hub")
    for part in (data.train, data.validation):
        image_ids = part.dataset["image_id"]
        classes = keep_classes(config(["cat"]), part)
        wide = add_boxes(part, classes, {image_ids[-1]: [(0, [1.0, 2.0, 8.0, 4.0], 0.9)]})
        assert wide.dataset["image_id"] == image_ids
        for before, after in zip(part.dataset, wide.dataset, strict=True):
            assert np.array_equal(before["image"], after["image"])
        counts = [len(objects["category"]) for objects in part.dataset["objects"]]
        assert [len(objects["category"]) for objects in wide.dataset["objects"]] == [*counts[:-1], counts[-1] + 1]


def test_some_classes_are_selected_by_name(scenes):
    chosen = select_classes(scenes, ["Star", "disc", "otter"])
    assert chosen.id2label == {0: "disc", 1: "star"}
    assert chosen.category_ids == [3, 21]
    for before, after in zip(scenes.dataset["objects"], chosen.dataset["objects"], strict=True):
        kept = [
            place for place, category in enumerate(before["category"]) if scenes.id2label[category] in ("disc", "star")
        ]
        assert after["bbox"] == [before["bbox"][place] for place in kept]
        assert [chosen.id2label[category] for category in after["category"]] == [
            scenes.id2label[before["category"][place]] for place in kept
        ]
    assert select_classes(scenes, ["otter"]).id2label == {}
    assert set(CATEGORIES.values()) == set(scenes.id2label.values())


def test_a_new_class_counts_as_much_as_all_old_classes():
    groups = ClassGroups(["cat", "dog", "cow"], ["otter"])
    metrics = {
        "eval_AP_class_cat": 0.8,
        "eval_AP_class_dog": 0.4,
        "eval_AP_class_cow": -1.0,
        "eval_AP_class_otter": 0.2,
    }
    assert groups.mean_aps(metrics, "eval_") == pytest.approx((0.6, 0.2))
    assert groups.balanced_ap(metrics, "eval_") == pytest.approx(0.4)
    assert groups.balanced_ap({"AP_class_otter": 0.2}) == 0.2  # no old class has ground truth
    assert groups.balanced_ap({}) == -1
