"""The metric gives what pycocotools gives for the same detections, and knows crowds, areas and original ids."""

import json
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from coco_reference import by_pycocotools
from dino_hf import DinoDetrImageProcessor
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.evaluation import coco_metric
from dino_hf.evaluation.coco_metric import NAMES
from dino_hf.training import CocoDetectionMetric, CocoEvaluator, DetectionCollator, DetectionTransform, load_coco


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
        with pytest.raises(ValueError, match=r"The images .* were evaluated before: .* sampled with repetition"):
            evaluate(evaluator, *take(indices), compute_result=is_last)
    assert evaluate(evaluator, *predictions) == wanted


def test_predictions_that_are_not_finite_are_refused(scenes):
    path, _ = scenes
    data = load_coco(path, path.parent)
    logits, boxes, labels = perfect_predictions(data)
    logits[2, 3, 1] = np.nan
    with pytest.raises(ValueError, match="The prediction for image 3 has scores or boxes that are NaN"):
        evaluate(CocoEvaluator(data, PROCESSOR), logits, boxes, labels)


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
        results = coco_metric._evaluate(truth, detections, list(classes))
        used = tracemalloc.get_traced_memory()[1] - sum(part.nbytes for result in results.values() for part in result)
        tracemalloc.stop()
        return used

    assert peak(6) < 1.3 * peak(1)


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
        coco_metric._columns([truth], "reference", coco_metric._TRUTH),
        coco_metric._columns([found], "prediction", coco_metric._DETECTIONS),
    ]
    few, many = (
        coco_metric.summarize(coco_metric._evaluate(*columns, [1], limit), {1: "cell"}) for limit in (100, 150)
    )
    assert few == many
    assert 0 < few["AP"] < few["AP50"] <= 1
