"""The metric gives what pycocotools gives for the same detections, and knows crowds, areas and original ids."""

import json
import re
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import evaluate
import numpy as np
import pytest

from coco_reference import by_pycocotools
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.evaluation import COCO_METRIC, coco
from dino_hf.evaluation.coco import NAMES
from dino_hf.training import CocoDetectionMetric


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = make_scenes(tmp_path_factory.mktemp("scenes") / "eval", 24, seed=7)
    content = json.loads(path.read_text())
    assert any(entry["iscrowd"] for entry in content["annotations"])
    assert {entry["image_id"] for entry in content["annotations"]} != {image["id"] for image in content["images"]}
    return path, content


def noisy_detections(content, seed=0):
    """Boxes near the annotated ones, some moved, relabelled or doubled, with random scores."""
    rng = np.random.default_rng(seed)
    detections = []
    for entry in content["annotations"] * 2:
        x, y, w, h = np.array(entry["bbox"]) + rng.normal(0, 2, 4)
        label = entry["category_id"] if rng.random() < 0.8 else int(rng.choice(list(CATEGORIES)))
        detections.append((entry["image_id"], [x, y, x + max(w, 1), y + max(h, 1)], label, float(rng.random())))
    return detections


def random_case(seed):
    """Annotations of a few images, and detections with what makes matching hard: equal overlaps and scores, areas on the borders of
    the size ranges, crowds, more than 100 detections of a class in an image, classes without objects, images without anything."""
    rng = np.random.default_rng(seed)
    num_images, category_ids = int(rng.integers(1, 6)), rng.choice(90, rng.integers(1, 5), replace=False).tolist()
    grid, levels = rng.choice([0.001, 1, 8]), rng.choice([2**24, 64, 4])
    annotations, detections = [], []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.integers(0, 12)):
            x, y, w, h = (np.concatenate([rng.uniform(0, 80, 2), np.exp(rng.uniform(1, 5, 2))]) / grid).round() * grid
            w, h = (32, 32) if rng.random() < 0.2 else (96, 96) if rng.random() < 0.2 else (max(w, grid), max(h, grid))
            box, area = [x, y, float(w), float(h)], float(w * h * rng.choice([1, 0.7]))
            category_id, iscrowd = int(rng.choice(category_ids)), int(rng.random() < 0.15)
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
            annotations.append({**entry, "bbox": box, "area": area, "iscrowd": iscrowd})
        own = [
            entry for entry in annotations if entry["image_id"] == image_id and entry["category_id"] != category_ids[0]
        ]
        for _ in range(rng.choice([0, 20, 250], p=[0.2, 0.7, 0.1])):
            if own and rng.random() < 0.7:
                entry = own[rng.integers(len(own))]
                category_id = entry["category_id"] if rng.random() < 0.8 else int(rng.choice(category_ids))
                box = np.array(entry["bbox"])
                box += rng.normal(0, rng.choice([0, 0.05, 0.2]), 4) * box[[2, 3, 2, 3]]
            else:
                category_id, box = int(rng.choice(category_ids)), rng.uniform(0, 80, 4)
            x, y, w, h = (box / grid).round() * grid
            corners = np.float32([x, y, x + max(w, 0), y + max(h, 0)]).tolist()
            score = np.float32(rng.integers(levels) / levels).item()
            detections.append((image_id, corners, category_id, score))
    return {
        "images": [{"id": image_id} for image_id in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": f"c{category_id}"} for category_id in category_ids],
    }, detections


def add(metric, content, detections):
    for image in content["images"]:
        found = [entry for entry in detections if entry[0] == image["id"]]
        truth = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        metric.add_batch(
            predictions=[
                {
                    "image_id": image["id"],
                    "boxes": [box for _, box, _, _ in found],
                    "scores": [score for *_, score in found],
                    "labels": [label for _, _, label, _ in found],
                }
            ],
            references=[
                {
                    "image_id": image["id"],
                    "boxes": [entry["bbox"] for entry in truth],
                    "labels": [entry["category_id"] for entry in truth],
                    "area": [entry["area"] for entry in truth],
                    "iscrowd": [entry["iscrowd"] for entry in truth],
                }
            ],
        )


def test_the_twelve_numbers_and_class_aps_are_those_of_pycocotools(scenes):
    path, content = scenes
    detections = noisy_detections(content)
    metric = CocoDetectionMetric(CATEGORIES)
    add(metric, content, detections)
    scores = metric.compute()
    assert scores == by_pycocotools(path, detections)
    assert 0.1 < scores["AP"] < 0.9


def test_they_are_to_the_last_bit_in_hard_cases_too(tmp_path):
    path, values, most = tmp_path / "annotations.json", [], Counter()
    for seed in range(40):
        content, detections = random_case(seed)
        path.write_text(json.dumps(content))
        metric = CocoDetectionMetric({entry["id"]: entry["name"] for entry in content["categories"]})
        add(metric, content, detections)
        scores = metric.compute()
        # without any detection, pycocotools reads no results
        assert scores == by_pycocotools(path, detections) if detections else scores["AP"] in (0, -1), seed
        values.append(scores["AP"])
        most.update((seed, image_id, category_id) for image_id, _, category_id, _ in detections)
    assert len(set(values)) > 20
    assert max(most.values()) > 100


def test_a_crowd_region_forgives_detections_and_is_no_miss():
    single = {"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    crowd = {"image_id": 1, "category_id": 3, "bbox": [50, 50, 40, 30], "area": 1200, "iscrowd": 1}
    detections = [(1, [10, 10, 30, 30], 3, 0.5), (1, [55, 52, 64, 72], 3, 0.99), (1, [75, 55, 85, 64], 3, 0.98)]

    def score(*annotations):
        metric = CocoDetectionMetric({3: "disc"})
        add(metric, {"images": [{"id": 1}], "annotations": annotations}, detections)
        return metric.compute()["AP"]

    assert score(single, crowd) == pytest.approx(1.0)
    assert score(single) == pytest.approx(1 / 3)  # the same detections are false positives ahead of the right one


def test_no_detections_and_no_annotations_are_scores_too(scenes):
    _, content = scenes
    metric = CocoDetectionMetric(CATEGORIES)
    add(metric, content, [])
    assert metric.compute()["AP"] == 0
    add(metric, content | {"annotations": []}, noisy_detections(content))
    assert metric.compute()["AP"] == -1


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [
        ({"labels": [4]}, {}, r"The prediction for image 1 has the labels \[4\], but class_names has \[3\]"),
        ({}, {"labels": [9]}, r"The reference for image 1 has the labels \[9\], but class_names has \[3\]"),
        ({"image_id": 2}, {}, "The prediction for image 2 has no reference"),
        ({"scores": [float("nan")]}, {}, "The prediction for image 1 has scores or boxes that are NaN"),
        ({"boxes": [[1, 1, float("inf"), 4]]}, {}, "The prediction for image 1 has scores or boxes that are NaN"),
        ({}, {"boxes": [[1, 1, float("nan"), 3]]}, "The reference for image 1 has scores or boxes that are NaN"),
        (
            {"scores": []},
            {},
            "The prediction for image 1 has lists of different lengths: .*'scores': 0.* one value in each",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(found, truth, message):
    metric = CocoDetectionMetric({3: "disc"})
    found = {"image_id": 1, "boxes": [[1, 1, 5, 4]], "scores": [0.5], "labels": [3]} | found
    truth = {"image_id": 1, "boxes": [[1, 1, 4, 3]], "labels": [3], "area": [12], "iscrowd": [0]} | truth
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[found], references=[truth])


def test_an_image_that_is_added_twice_is_an_error(scenes):
    _, content = scenes
    metric = CocoDetectionMetric(CATEGORIES)
    add(metric, content, [])
    add(metric, content | {"images": content["images"][:1]}, [])
    with pytest.raises(ValueError, match="Image 1 was added twice"):
        metric.compute()


def test_memory_does_not_grow_with_the_number_of_classes():
    """pycocotools holds dictionaries of what it is given at a time."""

    def peak(num_classes):
        rng = np.random.default_rng(0)
        low = rng.uniform(0, 50, (num_classes, 100, 2))
        boxes = np.concatenate([low, low + 40], axis=2)
        classes = range(num_classes)
        detections = {
            "image_id": np.tile(np.arange(100), num_classes),
            "boxes": boxes.reshape(-1, 4),
            "scores": rng.random(100 * num_classes),
            "labels": np.repeat(classes, 100),
        }
        truth = {"image_id": np.zeros(num_classes, dtype=int), "boxes": boxes[:, 0], "labels": np.array(classes)}
        truth |= {"area": np.full(num_classes, 1600.0), "iscrowd": np.zeros(num_classes, dtype=int)}
        tracemalloc.start()
        results = coco.evaluate_classes(truth, detections, list(classes))
        used = tracemalloc.get_traced_memory()[1] - sum(part.nbytes for result in results.values() for part in result)
        tracemalloc.stop()
        return used

    assert peak(6) < 1.3 * peak(1)


def test_classes_called_like_the_size_ranges_do_not_hide_them():
    metric = CocoDetectionMetric({1: "small", 2: "large"})
    add(metric, {"images": [{"id": 1}], "annotations": []}, [])
    assert {*NAMES, "AP_class_small", "AP_class_large"} == set(metric.compute())


def crowded(count: int) -> tuple[dict, dict]:
    boxes = [[20.0 * (i % 20), 20.0 * (i // 20), 12.0, 12.0] for i in range(count)]
    truth = {"image_id": 1, "boxes": boxes, "labels": [1] * count, "area": [144.0] * count, "iscrowd": [0] * count}
    found = {"image_id": 1, "boxes": [[x, y, x + w, y + h] for x, y, w, h in boxes]}
    return truth, found | {"scores": [0.9] * count, "labels": [1] * count}


@pytest.mark.parametrize("count", [100, 101, 400])
def test_a_perfect_detector_is_perfect_on_an_image_of_many_objects(count):
    truth, found = crowded(count)
    scores = CocoDetectionMetric({1: "cell"})._compute([found], [truth])
    assert scores["AP"] == scores["AP50"] == scores["AP75"] == scores["AP_small"] == scores["AR_small"] == 1
    assert scores["AP_class_cell"] == 1
    assert scores["AR_100"] == pytest.approx(100 / count)
    assert (scores["AR_1"], scores["AR_10"]) == pytest.approx((1 / count, 10 / count))
    assert (scores["AP_large"], scores["AR_medium"]) == (-1, -1)


def test_a_higher_limit_gives_the_same_numbers_where_it_cuts_nothing():
    rng = np.random.default_rng(0)
    truth, found = crowded(60)
    found["scores"] = rng.random(60).tolist()
    found["boxes"] = (np.array(found["boxes"]) + rng.normal(0, 1.5, (60, 4))).tolist()
    columns = [
        coco.join_images([truth], "reference", coco.TRUTH_TYPES),
        coco.join_images([found], "prediction", coco.DETECTION_TYPES),
    ]
    few, many = (coco.summarize(coco.evaluate_classes(*columns, [1], limit), {1: "cell"}) for limit in (100, 150))
    assert few == many
    assert 0 < few["AP"] < few["AP50"] <= 1


@pytest.mark.parametrize("class_names", [CATEGORIES, None])
def test_the_library_evaluate_loads_the_metric_from_the_folder(scenes, tmp_path, monkeypatch, class_names):
    path, content = scenes
    monkeypatch.setattr("evaluate.loading.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "evaluate_modules", raising=False)
    metric = evaluate.load(COCO_METRIC, cache_dir=str(tmp_path), class_names=class_names)
    add(metric, content, detections := noisy_detections(content))
    scores, expected = metric.compute(), by_pycocotools(path, detections)
    assert {name: scores[name] for name in NAMES} == {name: expected[name] for name in NAMES}
    names = class_names or {category_id: str(category_id) for category_id in CATEGORIES}
    assert [scores[f"AP_class_{names[key]}"] for key in CATEGORIES] == [
        expected[f"AP_class_{name}"] for name in CATEGORIES.values()
    ]


def test_without_boxes_and_names_there_are_no_classes():
    empty = {"image_id": 1, "boxes": [], "scores": [], "labels": [], "area": [], "iscrowd": []}
    with pytest.raises(ValueError, match="class_names"):
        CocoDetectionMetric()._compute([empty], [empty])


def test_only_the_metric_imports_the_library_evaluate_and_no_file_imports_the_metric_at_once():
    texts = {file: file.read_text() for file in Path(coco.__file__).parents[1].rglob("*.py")}
    importing = [file for file, text in texts.items() if re.search(r"^ *(import|from) evaluate\b", text, re.M)]
    assert importing == [Path(COCO_METRIC) / "coco_detection.py"]
    assert not [file for file, text in texts.items() if re.search(r"^(import|from) .*coco_detection", text, re.M)]
