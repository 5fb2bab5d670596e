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
from dino_hf.training import CocoDetectionMetric, CocoEvaluator, DetectionCollator, DetectionTransform, load_coco
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


def test_a_crowd_region_forgives_detections_and_is_no_miss():
    single = {"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    crowd = {"image_id": 1, "category_id": 3, "bbox": [50, 50, 40, 30], "area": 1200, "iscrowd": 1}
    detections = [(1, [10, 10, 20, 20], 3, 0.5), (1, [55, 52, 9, 20], 3, 0.99), (1, [75, 55, 10, 9], 3, 0.98)]

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


PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80})


def perfect_predictions(data):
    """Logits and boxes that find every object that is no crowd, and labels, in the padded form that Trainer hands over."""
    queries, logits, boxes = 12, [], []
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
    samples = data.dataset.with_transform(DetectionTransform(PROCESSOR))[:]
    rows = [{"pixel_values": image, "labels": labels} for image, labels in zip(*samples.values(), strict=True)]
    labels = {name: values.numpy() for name, values in DetectionCollator()(rows)["labels"].items()}
    return torch.stack(logits).numpy(), torch.stack(boxes).numpy(), labels


def evaluate(evaluator, logits, boxes, labels, **kwargs):
    return evaluator(EvalPrediction(predictions=({}, logits, boxes), label_ids=labels), **kwargs)


def test_detections_of_a_score_below_a_half_count_too(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = perfect_predictions(data)
    assert evaluate(CocoEvaluator(data, PROCESSOR), logits - 6, boxes, labels)["AP"] == pytest.approx(1.0, abs=1e-3)


def test_images_of_another_data_set_with_the_same_ids_are_refused(scenes, tmp_path):
    path, _ = scenes
    data = load_coco(path, path.parent)
    other = make_scenes(tmp_path / "other", 24, seed=8)
    evaluator = CocoEvaluator(load_coco(other, other.parent, like=data), PROCESSOR)
    logits, boxes, labels = perfect_predictions(data)
    with pytest.raises(ValueError, match=r"Image 1 is evaluated with .* each data set needs an evaluator of its own"):
        evaluate(evaluator, logits, boxes, labels)


@pytest.mark.parametrize("has_sizes", [True, False])
@pytest.mark.parametrize("changed", ["orig_size", "class_labels", "boxes", "number"])
def test_an_image_of_other_annotations_is_refused_and_leaves_nothing_behind(scenes, tmp_path, changed, has_sizes):
    path, content = scenes
    if not has_sizes:
        images = [{"id": image["id"], "file_name": image["file_name"]} for image in content["images"]]
        (tmp_path / "annotations.json").write_text(json.dumps(content | {"images": images}))
    data = load_coco(path if has_sizes else tmp_path / "annotations.json", path.parent)
    logits, boxes, labels = perfect_predictions(data)
    evaluator = CocoEvaluator(data, PROCESSOR)
    wrong = {name: values.copy() for name, values in labels.items()}
    image = int((labels["class_labels"] >= 0).sum(1).argmax())
    if changed == "number":
        wrong["class_labels"][image, 0] = -100
    else:
        wrong[changed][image] = wrong[changed][image] * 2 + 1
    evaluate(evaluator, logits[:image], boxes[:image], {k: v[:image] for k, v in labels.items()}, compute_result=False)
    with pytest.raises(ValueError, match=f"Image {labels['image_id'][image]} is evaluated with"):
        evaluate(evaluator, logits[image:], boxes[image:], {name: values[image:] for name, values in wrong.items()})
    assert evaluate(evaluator, logits, boxes, labels)["AP"] > 0.99


def test_an_image_without_objects_is_known_by_its_size(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = perfect_predictions(data)
    empty = int((labels["class_labels"] >= 0).sum(1).argmin())
    assert (labels["class_labels"][empty] == -100).all()
    labels["orig_size"][empty] += 1
    with pytest.raises(ValueError, match=f"Image {labels['image_id'][empty]} is evaluated with"):
        evaluate(CocoEvaluator(data, PROCESSOR), logits, boxes, labels)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([{"class_labels": [1], "boxes": [[0.5] * 4]}], "a list"),
        (({"image_id": np.ones(2)},), "a tuple"),
        ({"class_labels": np.ones((2, 1)), "boxes": np.ones((2, 1, 4))}, r"a dict of \['boxes', 'class_labels'\]"),
        (None, "a NoneType"),
    ],
)
def test_labels_of_another_form_are_refused_with_the_collator_to_use(scenes, labels, found):
    path, _ = scenes
    evaluator = CocoEvaluator(load_coco(path, path.parent), PROCESSOR)
    with pytest.raises(ValueError, match=f"are {found}, but .* DetectionCollator .* eval_do_concat_batches=True"):
        evaluator(EvalPrediction(predictions=[], label_ids=labels))


def test_perfect_predictions_score_one_in_one_go_and_batch_by_batch(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = perfect_predictions(data)
    evaluator = CocoEvaluator(data, PROCESSOR)
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
    evaluator = CocoEvaluator(data, PROCESSOR)
    evaluator(whole, compute_result=False)
    with pytest.raises(ValueError, match=r"images \[1, 2, 3, 4, 5\] were evaluated before"):
        evaluator(whole)
    assert evaluator(whole)["AP"] > 0.99
    unknown = {name: values[:1] for name, values in labels.items()} | {"image_id": np.array([99])}
    with pytest.raises(ValueError, match=r"images \[99\] are not in the data"):
        evaluate(evaluator, logits[:1], boxes[:1], unknown)
