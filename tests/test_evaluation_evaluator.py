"""The evaluator of a Trainer gives pycocotools' numbers, batch by batch or at once, and refuses other data."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from coco_reference import by_pycocotools
from dino_hf import DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.training import CocoEvaluator, DetectionCollator, DetectionTransform, load_coco
from evaluation_toys import draw_crowded


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = make_scenes(tmp_path_factory.mktemp("scenes") / "eval", 24, seed=7)
    content = json.loads(path.read_text())
    assert any(entry["iscrowd"] for entry in content["annotations"])
    assert {entry["image_id"] for entry in content["annotations"]} != {image["id"] for image in content["images"]}
    return path, content


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


def random_predictions(data, num_queries=100):
    """As above, with further detections anywhere; equal scores are frequent, and there are more than 300 candidates."""
    logits, boxes, labels = perfect_predictions(data)
    generator = torch.Generator().manual_seed(0)
    count, found, num_classes = logits.shape
    others = 2 * torch.randn(count, num_queries - found, num_classes, generator=generator) - 2
    logits = torch.cat([torch.tensor(logits) / 2, others], dim=1).round(decimals=1)
    others = 0.2 + 0.6 * torch.rand(count, num_queries - found, 4, generator=generator)
    return logits.numpy(), torch.cat([torch.tensor(boxes), others], dim=1).numpy(), labels


def by_pycocotools_alone(path, data, logits, boxes, labels):
    """The detections of each image by itself, as users get them, to pycocotools."""
    results = []
    for index, image_id in enumerate(labels["image_id"].tolist()):
        outputs = SimpleNamespace(logits=torch.tensor(logits[index, None]), pred_boxes=torch.tensor(boxes[index, None]))
        found = PROCESSOR.post_process_object_detection(outputs, -1.0, labels["orig_size"][index, None])[0]
        columns = (found[name].tolist() for name in ("boxes", "labels", "scores"))
        results += [
            (image_id, box, data.category_ids[label], score) for box, label, score in zip(*columns, strict=True)
        ]
    return by_pycocotools(path, results)


def batches(logits, boxes, labels, size):
    """As `Trainer` hands them over with `batch_eval_metrics=True`."""
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        predictions = ({}, torch.tensor(logits[part]), torch.tensor(boxes[part]))
        yield predictions, {name: torch.tensor(value[part]) for name, value in labels.items()}


@pytest.mark.parametrize("num_queries", [100, 40])  # more and less than 300 candidates
def test_the_best_detections_of_batches_give_the_numbers_of_all_logits_and_of_pycocotools(scenes, num_queries):
    path, _ = scenes
    data = load_coco(path, path.parent)
    predictions = random_predictions(data, num_queries)
    evaluator = CocoEvaluator(data, PROCESSOR)
    whole = evaluate(evaluator, *predictions)
    assert whole == by_pycocotools_alone(path, data, *predictions)
    assert 0.1 < whole["AP"] < 0.9
    for _ in range(2):
        for batch, labels in batches(*predictions, size=7):
            kept = evaluator.keep_top(batch, labels)
            is_last = labels["image_id"][-1] == predictions[2]["image_id"][-1]
            result = evaluator(EvalPrediction(predictions=kept, label_ids=labels), compute_result=is_last)
        assert result == whole


def test_what_is_kept_is_small(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = random_predictions(data)
    evaluator = CocoEvaluator(data, PROCESSOR)
    kept = evaluator.keep_top(({}, torch.tensor(logits).bfloat16(), torch.tensor(boxes).half()), labels)
    assert {name: (values.shape, values.dtype) for name, values in kept.items()} == {
        "scores": ((24, 300), torch.float32),
        "labels": ((24, 300), torch.int32),
        "boxes": ((24, 300, 4), torch.float32),
    }
    evaluator(EvalPrediction(predictions=kept, label_ids=labels), compute_result=False)
    assert {sum(values.nbytes for values in image.values()) for image in evaluator.detections.values()} == {300 * 6 * 4}


def test_detections_of_an_image_do_not_depend_on_the_batch_to_the_last_bit():
    """On a CPU, 1 in 20 sigmoids would: the end of a tensor is computed in another way."""
    outputs = SimpleNamespace(logits=4 * torch.randn(400, 3, 7), pred_boxes=torch.rand(400, 3, 4))
    whole = PROCESSOR.top_detections(outputs)
    for index in range(400):
        alone = SimpleNamespace(logits=outputs.logits[index, None], pred_boxes=outputs.pred_boxes[index, None])
        for name, values in PROCESSOR.top_detections(alone).items():
            assert torch.equal(values[0], whole[name][index])


def test_queries_that_trainer_adds_to_join_batches_are_no_detections(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = random_predictions(data, num_queries=40)
    evaluator = CocoEvaluator(data, PROCESSOR)
    wanted = evaluate(evaluator, logits, boxes, labels)
    more_logits, more_boxes = (
        np.pad(values, ((0, 0), (0, 3), (0, 0)), constant_values=-100) for values in (logits, boxes)
    )
    kept = evaluator.keep_top(({}, more_logits, more_boxes), labels)
    assert (kept["labels"] >= 0).sum(1).tolist() == [200] * 24
    assert kept["labels"].shape == (24, 215)
    assert evaluator(EvalPrediction(predictions=kept, label_ids=labels)) == wanted
    assert evaluate(evaluator, more_logits, more_boxes, labels) == wanted


def test_images_that_fill_up_the_last_batch_count_once(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    predictions = random_predictions(data)
    evaluator = CocoEvaluator(data, PROCESSOR)
    wanted = evaluate(evaluator, *predictions)

    def take(indices):
        logits, boxes, labels = predictions
        return logits[indices], boxes[indices], {name: values[indices] for name, values in labels.items()}

    assert evaluate(evaluator, *take([*range(24), 0, 1, 0])) == wanted
    evaluate(evaluator, *take([*range(20)]), compute_result=False)
    assert evaluate(evaluator, *take([20, 21, 22, 23, 0, 1])) == wanted
    for indices, is_last in [([20, 0, 21], True), ([0, 20], True), ([0, 1], True), ([20, 0], False), ([20, 20], False)]:
        evaluate(evaluator, *take([*range(20)]), compute_result=False)
        with pytest.raises(ValueError, match=r"The images .* were evaluated before.* sampled with repetition"):
            evaluate(evaluator, *take(indices), compute_result=is_last)
    assert evaluate(evaluator, *predictions) == wanted


def test_predictions_that_are_not_finite_are_refused(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = perfect_predictions(data)
    logits[2, 3, 1] = np.nan
    with pytest.raises(ValueError, match="The prediction for image 3 has scores or boxes that are NaN"):
        evaluate(CocoEvaluator(data, PROCESSOR), logits, boxes, labels)


def test_images_of_another_data_set_with_the_same_ids_are_refused(scenes, tmp_path):
    path, _ = scenes
    data = load_coco(path, path.parent)
    other = make_scenes(tmp_path / "other", 24, seed=8)
    evaluator = CocoEvaluator(load_coco(other, other.parent, like=data), PROCESSOR)
    logits, boxes, labels = perfect_predictions(data)
    with pytest.raises(ValueError, match=r"Image 1 is evaluated with .* each data set needs its own evaluator"):
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
    message = f"are {found}, but .* DetectionCollator .* eval_do_concat_batches=True"
    with pytest.raises(ValueError, match=message):
        evaluator(EvalPrediction(predictions=[], label_ids=labels))
    with pytest.raises(ValueError, match=message):
        evaluator.keep_top((), labels)


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


@pytest.mark.parametrize("limit", [None, 100, 120, 900])
def test_any_limit_of_detections_gives_pycocotools_numbers(limit, tmp_path):
    path = draw_crowded(tmp_path / "data")
    data = load_coco(path, path.parent)
    logits, boxes, labels = crowded_predictions(data)
    evaluator = CocoEvaluator(data, PROCESSOR, max_detections=limit)
    most = max(
        Counter(
            (entry["image_id"], entry["category_id"])
            for entry in json.loads(path.read_text())["annotations"]
            if not entry["iscrowd"]
        ).values()
    )
    counted = limit or most
    assert most > 100
    assert evaluator.top_k == (300 if counted == 100 else max(300, 3 * counted))
    rows = []
    for index, image_id in enumerate(labels["image_id"].tolist()):
        outputs = SimpleNamespace(logits=torch.tensor(logits[index, None]), pred_boxes=torch.tensor(boxes[index, None]))
        size = labels["orig_size"][index, None]
        found = PROCESSOR.post_process_object_detection(outputs, -1.0, size, top_k=evaluator.top_k)[0]
        columns = (found[name].tolist() for name in ("boxes", "labels", "scores"))
        rows += [(image_id, box, data.category_ids[label], score) for box, label, score in zip(*columns, strict=True)]
    assert evaluate(evaluator, logits, boxes, labels) == by_pycocotools(path, rows, limit=counted)


def crowded_predictions(data, num_queries=1000):
    """Predictions near the objects of `draw_crowded` and elsewhere, and labels."""
    samples = data.dataset.with_transform(DetectionTransform(PROCESSOR))[:]
    rows = [{"pixel_values": image, "labels": labels} for image, labels in zip(*samples.values(), strict=True)]
    labels = {name: values.numpy() for name, values in DetectionCollator()(rows)["labels"].items()}
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(rows), num_queries, len(data.category_ids), generator=generator)
    boxes = 0.2 + 0.6 * torch.rand(len(rows), num_queries, 4, generator=generator)
    for index, row in enumerate(rows):
        count = min(len(row["labels"]["boxes"]), num_queries)
        boxes[index, :count] = row["labels"]["boxes"][:count]
        logits[index, torch.arange(count), row["labels"]["class_labels"][:count]] += 3
    return logits.numpy(), boxes.numpy(), labels


def test_a_limit_below_coco_is_refused(scenes):
    path, _ = scenes
    with pytest.raises(ValueError, match="max_detections=99 must be at least 100"):
        CocoEvaluator(load_coco(path, path.parent), PROCESSOR, max_detections=99)
