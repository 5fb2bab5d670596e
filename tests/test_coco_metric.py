"""The metric gives what pycocotools gives for the same detections, and knows crowds, areas and original ids."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import EvalPrediction

from dino_hf import DinoDetrImageProcessor
from dino_hf.tools.scenes import CATEGORIES, make_scenes
from dino_hf.training import CocoDetectionMetric, CocoEvaluator, load_coco
from dino_hf.training.coco_metric import NAMES


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = make_scenes(tmp_path_factory.mktemp("scenes") / "eval", 24, seed=7)
    content = json.loads(path.read_text())
    assert any(entry["iscrowd"] for entry in content["annotations"])
    assert {entry["image_id"] for entry in content["annotations"]} != {image["id"] for image in content["images"]}
    return path, content


def noisy_detections(content, seed=0):
    """Boxes near the annotated ones, some moved, relabelled or doubled, with random scores; and some from nowhere."""
    rng = np.random.default_rng(seed)
    detections = []
    for entry in content["annotations"] * 2:
        x, y, w, h = np.array(entry["bbox"]) + rng.normal(0, 2, 4)
        label = entry["category_id"] if rng.random() < 0.8 else int(rng.choice(list(CATEGORIES)))
        detections.append((entry["image_id"], [x, y, max(w, 1), max(h, 1)], label, float(rng.random())))
    return detections


def by_pycocotools(path, detections):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        results = [
            {"image_id": image_id, "bbox": box, "category_id": label, "score": score}
            for image_id, box, label, score in detections
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def add(metric, content, detections):
    for image in content["images"]:
        found = [entry for entry in detections if entry[0] == image["id"]]
        truth = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        metric.add_batch(
            predictions=[
                {
                    "image_id": image["id"],
                    "boxes": [[x, y, x + w, y + h] for _, (x, y, w, h), _, _ in found],
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
    evaluation = by_pycocotools(path, detections)
    # corners and back cost the last bit of a box; no overlap lies that close to a threshold
    assert [scores[name] for name in NAMES] == pytest.approx(evaluation.stats.tolist(), abs=1e-12)
    assert 0.1 < scores["AP"] < 0.9
    for index, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, index, 0, -1]
        assert scores[f"AP_class_{CATEGORIES[category_id]}"] == pytest.approx(precision[precision > -1].mean())


def test_a_crowd_region_forgives_detections_and_is_no_miss(scenes):
    _, content = scenes
    image_id = next(entry["image_id"] for entry in content["annotations"] if entry["iscrowd"])
    truth = [entry for entry in content["annotations"] if entry["image_id"] == image_id]
    crowd = next(entry for entry in truth if entry["iscrowd"])
    x, y, w, h = crowd["bbox"]
    inside = [(image_id, [x + w / 4, y + h / 4, w / 3, h / 3], crowd["category_id"], 0.99)]
    exact = [(image_id, entry["bbox"], entry["category_id"], 0.5) for entry in truth if not entry["iscrowd"]]

    def score(annotations):
        metric = CocoDetectionMetric(CATEGORIES)
        add(metric, {"images": [{"id": image_id}], "annotations": annotations}, exact + inside)
        return metric.compute()["AP"]

    assert score(truth) == pytest.approx(1.0)
    rest = [entry for entry in truth if not entry["iscrowd"]]
    if any(entry["category_id"] == crowd["category_id"] for entry in rest):
        assert score(rest) < 1.0  # without the crowd, the same detection is a false positive


def test_no_detections_and_no_annotations_are_scores_too(scenes):
    _, content = scenes
    metric = CocoDetectionMetric(CATEGORIES)
    add(metric, content, [])
    assert metric.compute()["AP"] == 0
    add(metric, content | {"annotations": []}, noisy_detections(content))
    assert metric.compute()["AP"] == -1


def test_an_image_that_is_added_twice_is_an_error(scenes):
    _, content = scenes
    metric = CocoDetectionMetric(CATEGORIES)
    add(metric, content, [])
    add(metric, content | {"images": content["images"][:1]}, [])
    with pytest.raises(ValueError, match="Image 1 was added twice"):
        metric.compute()


def perfect_predictions(data):
    """Logits and boxes that find every object that is no crowd, in the padded form that Trainer hands over."""
    queries, logits, boxes, sizes, image_ids = 12, [], [], [], []
    for row in data.dataset:
        image_logits, image_boxes = torch.full((queries, len(data.category_ids)), -8.0), torch.full((queries, 4), 0.5)
        kept = [i for i, iscrowd in enumerate(row["objects"]["iscrowd"]) if not iscrowd]
        for query, i in enumerate(kept):
            x, y, w, h = row["objects"]["bbox"][i]
            image_logits[query, row["objects"]["category"][i]] = 5.0 - query / 10
            size = torch.tensor(row["image"].size * 2)
            image_boxes[query] = torch.tensor([x + w / 2, y + h / 2, w, h]) / size
        logits.append(image_logits)
        boxes.append(image_boxes)
        sizes.append([row["image"].height, row["image"].width])
        image_ids.append(row["image_id"])
    labels = {"image_id": np.array(image_ids), "orig_size": np.array(sizes)}
    return torch.stack(logits).numpy(), torch.stack(boxes).numpy(), labels


def test_perfect_predictions_score_one_in_one_go_and_batch_by_batch(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = perfect_predictions(data)
    evaluator = CocoEvaluator(data, DinoDetrImageProcessor())
    whole = evaluator(EvalPrediction(predictions=({}, logits, boxes), label_ids=labels))
    assert whole["AP"] == pytest.approx(1.0, abs=1e-3)
    for start in range(0, len(logits), 7):
        part = slice(start, start + 7)
        batch = EvalPrediction(
            predictions=({}, torch.tensor(logits[part]), torch.tensor(boxes[part])),
            label_ids={name: torch.tensor(value[part]) for name, value in labels.items()},
        )
        result = evaluator(batch, compute_result=start + 7 >= len(logits))
    assert result == whole


def test_classes_called_like_the_size_ranges_do_not_hide_them():
    metric = CocoDetectionMetric({1: "small", 2: "large"})
    add(metric, {"images": [{"id": 1}], "annotations": []}, [])
    assert {*NAMES, "AP_class_small", "AP_class_large"} == set(metric.compute())


def test_an_evaluation_that_was_broken_off_does_not_count_in_the_next(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = perfect_predictions(data)
    whole = EvalPrediction(predictions=({}, logits, boxes), label_ids=labels)
    evaluator = CocoEvaluator(data, DinoDetrImageProcessor())
    evaluator(whole, compute_result=False)
    with pytest.raises(ValueError, match=r"images \[1, 2, 3, 4, 5\] were evaluated before"):
        evaluator(whole)
    assert evaluator(whole)["AP"] > 0.99
    with pytest.raises(ValueError, match=r"images \[99\] are not in the data"):
        evaluator(EvalPrediction(({}, logits[:1], boxes[:1]), {"image_id": [99], "orig_size": labels["orig_size"][:1]}))
