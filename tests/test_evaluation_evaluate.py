"""The numbers are pycocotools' for the detections that are written, whatever the classes are numbered like."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_reference import by_pycocotools
from dino_hf.cli.eval import _show
from dino_hf.common.console import make_console
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.evaluation import evaluate, evaluate_model, load_split, report
from dino_hf.evaluation.coco import NAMES
from dino_hf.inference.predictor import Detections
from dino_hf.training import load_coco
from evaluation_toys import ReadyPredictor, draw_blocks, draw_crowded, noisy_answers


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "drawn", 24, seed=7)


@pytest.fixture(scope="module")
def data(path):
    return load_coco(path, path.parent)


@pytest.fixture(scope="module")
def answers(data):
    return noisy_answers(data, seed=1)


@pytest.fixture(scope="module")
def evaluation(data, answers):
    return evaluate_model(ReadyPredictor(data.id2label, answers), data, num_bootstrap=200)


def with_other_ids(path, folder, change):
    """The same data, their categories numbered otherwise."""
    content = json.loads(path.read_text())
    for entry in content["categories"]:
        entry["id"] = change[entry["id"]]
    for entry in content["annotations"]:
        entry["category_id"] = change[entry["category_id"]]
    other = folder / "annotations.json"
    other.write_text(json.dumps(content))
    return load_coco(other, path.parent)


def test_the_numbers_are_pycocotools_to_the_last_bit(path, evaluation):
    detections = [
        (image_id, box.tolist(), category_id, score)
        for image_id, box, category_id, score in zip(
            *(evaluation.found[name] for name in ("image_id", "boxes", "labels", "scores")), strict=True
        )
    ]
    assert evaluation.metrics == by_pycocotools(path, detections)
    assert 0.2 < evaluation.metrics["AP"] < 0.8
    assert set(evaluation.metrics) == {*NAMES, *(f"AP_class_{name}" for name in CATEGORIES.values())}


def test_pycocotools_reads_the_detections_and_gives_the_same_numbers(path, evaluation, tmp_path):
    (tmp_path / "detections.json").write_text(json.dumps(evaluation.detections))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        coco = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    assert coco.stats.tolist() == [evaluation.metrics[name] for name in NAMES]
    assert {entry["category_id"] for entry in evaluation.detections} == set(CATEGORIES)


def test_rows_of_classes_are_what_pycocotools_gives_for_each(data, evaluation):
    for row in evaluation.per_class:
        assert row["AP"] == evaluation.metrics[f"AP_class_{row['name']}"]
        assert row["AP50"] > row["AP"] > 0
        assert CATEGORIES[row["category_id"]] == row["name"]
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AR_100"):
        values = [row[name] for row in evaluation.per_class if row[name] >= 0]
        assert np.mean(values) == pytest.approx(evaluation.metrics[name], rel=1e-12)  # sums in another order
    counts = evaluation.counts
    assert counts["objects"] == sum(row["num_objects"] for row in evaluation.per_class)
    assert counts["objects"] == counts["objects_small"] + counts["objects_medium"] + counts["objects_large"]
    assert counts["images"] == 24
    assert counts["crowds"] > 0


def test_intervals_hold_the_number_and_are_of_the_seed(data, answers, evaluation):
    assert set(evaluation.intervals) == {
        *("AP", "AP50", "AP75", "AP_small", "AP_medium"),
        *(f"AP_class_{name}" for name in CATEGORIES.values()),
    }
    for name, (low, high) in evaluation.intervals.items():
        assert 0 <= low < evaluation.metrics[name] < high <= 1
    again = evaluate_model(ReadyPredictor(data.id2label, answers), data, num_bootstrap=200)
    other = evaluate_model(ReadyPredictor(data.id2label, answers), data, num_bootstrap=200, seed=1)
    assert again.intervals == evaluation.intervals != other.intervals
    none = evaluate_model(ReadyPredictor(data.id2label, answers), data, num_bootstrap=0)
    assert none.intervals == {}
    assert none.metrics == evaluation.metrics


@pytest.mark.parametrize(
    "change", [dict(zip(CATEGORIES, range(5), strict=True)), {3: 900, 7: 5, 12: 40000, 21: 6, 40: 1}]
)
def test_other_category_ids_give_the_same_numbers(path, answers, evaluation, tmp_path, data, change):
    other = with_other_ids(path, tmp_path, change)
    found = evaluate_model(ReadyPredictor(data.id2label, answers, list(CATEGORIES)), other, num_bootstrap=50)
    assert found.metrics == pytest.approx(evaluation.metrics, rel=1e-12)  # classes are summed in another order
    assert found.best == evaluation.best
    assert [{**entry, "category_id": 0} for entry in found.detections] == [
        {**entry, "category_id": 0} for entry in evaluation.detections
    ]
    assert {entry["category_id"] for entry in found.detections} == set(change.values())


def test_classes_of_the_model_alone_are_left_out_and_counted_and_those_of_the_data_alone_have_no_ap(
    data, answers, caplog
):
    names = {**data.id2label, 1: "cloud"}
    found = evaluate_model(ReadyPredictor(names, answers), data, num_bootstrap=40)
    num_boxes = sum((labels == 1).sum() for _, _, labels in answers.values())
    assert found.left_out == {"cloud": num_boxes}
    assert found.counts["detections_left_out"] == num_boxes
    assert found.metrics["AP_class_box"] == 0
    assert "does not know 1 of 5 classes of the data. Their AP is 0: 'box'" in caplog.text
    assert found.notes == caplog.messages


def test_a_model_that_finds_nothing_scores_zero(data):
    nothing = {row["image"].tobytes(): ([], [], []) for row in data.dataset}
    found = evaluate_model(ReadyPredictor(data.id2label, nothing), data, num_bootstrap=40)
    assert (found.metrics["AP"], found.intervals["AP"], found.best_threshold) == (0, (0, 0), None)
    assert found.detections == []


def test_a_class_without_objects_is_none(tmp_path):
    data = draw_blocks(tmp_path / "blocks", ["a", "b", "unused"], 5, unused=1)
    found = evaluate_model(ReadyPredictor(data.id2label, noisy_answers(data)), data, num_bootstrap=40)
    assert found.metrics["AP_class_unused"] == -1
    assert "AP_class_unused" not in found.intervals
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert content["metrics"]["AP_class_unused"] is content["per_class"][2]["AP"] is None
    assert content["metrics"]["AP"] == found.metrics["AP"]
    assert -1 not in content["metrics"].values()


def test_progress_goes_to_the_end(data, answers):
    seen = []
    evaluate_model(
        ReadyPredictor(data.id2label, answers), data, num_bootstrap=40, progress=lambda *step: seen.append(step)
    )
    assert {stage for stage, *_ in seen} == {"images", "classes", "resampled classes"}
    assert {("images", 24, 24), ("classes", 5, 5), ("resampled classes", 5, 5)} <= set(seen)


class Failing(ReadyPredictor):
    """Works on many images at a time, like the real one; an error comes up with any of them."""

    error, alone = ValueError("An image has mode 'F'."), True

    def __call__(self, images, *, batch_size=8, threshold=0.0, max_detections=None):
        images = list(images)
        if any(image.tobytes() == self.bad for image in images) and (self.alone or len(images) > 1):
            raise self.error
        yield from super().__call__(images)


def test_an_error_of_an_image_names_its_file(data, answers):
    predictor = Failing(data.id2label, answers)
    predictor.bad = data.dataset[9]["image"].tobytes()
    with pytest.raises(ValueError, match="mode 'F'") as raised:
        evaluate_model(predictor, data)
    assert raised.value.__notes__ == ["This is 000010.png."]
    predictor.alone, predictor.error = False, RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        evaluate_model(predictor, data)
    assert raised.value.__notes__ == [
        "The error came between 000001.png and 000024.png. A smaller batch size needs less memory."
    ]
    predictor.error = torch.AcceleratorError("device-side assert triggered")  # after which no image runs
    predictor.alone = True
    with pytest.raises(RuntimeError, match="device-side") as raised:
        evaluate_model(predictor, data)
    assert "between 000001.png and 000024.png" in raised.value.__notes__[0]


def test_an_evaluation_that_is_broken_off_says_where(data, answers):
    predictor = ReadyPredictor(data.id2label, answers)

    def stop(stage, done, total):
        if (stage, done) == ("images", 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        evaluate_model(predictor, data, progress=stop)
    assert raised.value.__notes__ == ["The evaluation stopped after 6 images, at 000006.png."]


def test_an_image_that_does_not_fit_its_annotations_is_named(tmp_path):
    data = draw_blocks(tmp_path / "blocks", ["a", "b"], 4)
    answers = noisy_answers(data)
    image = Image.open(tmp_path / "blocks" / "0003.png")
    image.resize((50, 40)).save(tmp_path / "blocks" / "0003.png")
    with pytest.raises(ValueError, match="Image 3 is 50 wide and 40 high") as raised:
        evaluate_model(ReadyPredictor(data.id2label, answers), data)
    assert raised.value.__notes__ == ["This is 0003.png."]
    (tmp_path / "blocks" / "0003.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"0003.png cannot be read"):
        evaluate_model(ReadyPredictor(data.id2label, answers), data)


def test_a_split_is_found_or_refused(path, data):
    assert load_split(data, "test") == (data, [])
    part, notes = load_split(path, "validation")
    assert 0 < len(part.dataset) < 24
    assert any("held out" in note for note in notes)
    with pytest.raises(ValueError, match="has no test images, but train, validation; choose split validation"):
        load_split(path, "test")
    with pytest.raises(ValueError, match="split='val' must be one of train, validation, test"):
        load_split(path, "val")


def test_the_function_for_users_writes_its_report(data, answers, tmp_path, monkeypatch):
    predictor, written = ReadyPredictor(data.id2label, answers), []
    monkeypatch.setitem(evaluate.__globals__, "Predictor", ReadyPredictor)
    monkeypatch.setattr(report, "save_report", lambda *arguments: written.append(arguments))
    found = evaluate(predictor, data, output_dir=tmp_path / "out", num_bootstrap=40)
    assert written == [(found, data, tmp_path / "out")]
    with pytest.raises(ValueError, match="num_bootstrap=-1 is too low"):
        evaluate(predictor, data, num_bootstrap=-1)
    with pytest.raises(ValueError, match=r"device='cpu' has no effect on a Predictor, which has its own"):
        evaluate(predictor, data, device="cpu")


def test_more_objects_than_coco_counts_are_counted_and_said(tmp_path):
    objects = [[3.0 * (number % 40), 6.0 * (number // 40), 2.0, 4.0] for number in range(130)]
    Image.new("RGB", (125, 40)).save(tmp_path / "1.png")
    images = [{"id": 1, "file_name": "1.png", "width": 125, "height": 40}]
    boxes = [
        {"id": number, "image_id": 1, "category_id": 7, "bbox": box, "area": 8, "iscrowd": 0}
        for number, box in enumerate(objects, start=1)
    ]
    path = tmp_path / "cells.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "cell"}]}))
    data = load_coco(path, tmp_path)
    corners = [[x, y, x + w, y + h] for x, y, w, h in objects]
    predictor = ReadyPredictor(data.id2label, {data.dataset[0]["image"].tobytes(): (corners, [0.9] * 130, [0] * 130)})
    found = evaluate_model(predictor, data, num_bootstrap=0)
    assert (found.metrics["AP"], found.max_detections) == (1, 130)
    assert found.per_class[0]["AR_100"] == found.metrics["AR_100"] == pytest.approx(100 / 130)
    assert found.notes[-1].startswith("An image has 130 objects of one class, so AP counts the best 130 detections")
    as_coco = evaluate_model(predictor, data, num_bootstrap=0, max_detections=100)
    assert as_coco.metrics["AP"] < 0.8
    assert as_coco.notes[-1].endswith("AP counts only the best 100 detections, as max_detections says.")
    with pytest.raises(ValueError, match="max_detections=99 must be at least 100, COCO's own limit"):
        evaluate_model(predictor, data, max_detections=99)


@pytest.mark.parametrize("limit", [100, 120, 130, 900])
def test_any_limit_of_detections_gives_pycocotools_numbers(limit, tmp_path):
    path = draw_crowded(tmp_path / "data")
    data = load_coco(path, path.parent)
    answers = noisy_answers(data, noise=0.5, num_false=260)
    found = evaluate_model(ReadyPredictor(data.id2label, answers), data, num_bootstrap=0, max_detections=limit)
    rows = [
        (entry["image_id"], [x, y, x + w, y + h], entry["category_id"], entry["score"])
        for entry in found.detections
        for x, y, w, h in [entry["bbox"]]
    ]
    expected = by_pycocotools(path, rows, limit=limit)
    assert found.metrics == expected
    assert (f"AR_{limit}" in found.metrics, found.max_detections) == (True, limit)
    if limit > 100:
        assert found.metrics[f"AR_{limit}"] > found.metrics["AR_100"]


def test_the_printed_ap_and_the_results_name_the_limit(tmp_path, capsys):
    path = draw_crowded(tmp_path / "data")
    data = load_coco(path, path.parent)
    predictor = ReadyPredictor(data.id2label, noisy_answers(data))
    for limit, text in ((900, " of 900 detections per image and class, AR_900 0."), (100, None)):
        found = evaluate_model(predictor, data, num_bootstrap=0, max_detections=limit)
        _show(make_console(width=200), found)
        title = capsys.readouterr().out.splitlines()[0]
        assert (text in title) if text else ("detections" not in title)
        assert found.as_dict()["max_detections"] == limit
        assert ("AR_900" in found.as_dict()["metrics"]) == (limit == 900)


def large_scene(folder):
    """An image of 700 x 400 pixels with three small objects, and an image of 100 x 80 pixels with one object."""
    images, annotations, number = [], [], 0
    for image_id, size, boxes in (
        (7, (700, 400), [(30, 40, 24, 20), (305, 300, 22, 26), (650, 10, 30, 24)]),
        (9, (100, 80), [(10, 20, 30, 24)]),
    ):
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        for x, y, width, height in boxes:
            pixels[y : y + height, x : x + width] = 255
            number += 1
            box = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
            annotations.append({"id": number, "image_id": image_id, "category_id": 3} | box)
        Image.fromarray(pixels).save(folder / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": size[0], "height": size[1]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "blot"}]}
    (folder / "large.json").write_text(json.dumps(content))
    return load_coco(folder / "large.json", folder)


class NearSighted:
    """Detects white rectangles in images of up to 300 pixels. Larger images are too large for it."""

    name, id2label, category_ids = "near-sighted", {0: "blot"}, [3]

    def __init__(self):
        self.sizes = []

    def __call__(self, images, *, batch_size, threshold, max_detections=None):
        for image in images:
            self.sizes.append(image.size)
            white, boxes = np.asarray(image)[..., 0] > 0, []
            while max(image.size) <= 300 and white.any():
                y, x = np.argwhere(white)[0]
                width = int(np.argmin(np.append(white[y, x:], False)))
                height = int(np.argmin(np.append(white[y:, x], False)))
                white = white.copy()
                white[y : y + height, x : x + width] = False
                boxes.append((x, y, x + width, y + height))
            yield Detections.sorted(boxes, [0.9] * len(boxes), [0] * len(boxes))


def test_with_tiles_ap_is_that_of_merged_detections_in_whole_images(tmp_path):
    data = large_scene(tmp_path)
    without = evaluate_model(NearSighted(), data, num_bootstrap=0)
    assert without.metrics["AR_100"] == pytest.approx(0.25)
    assert without.tiling is None
    assert without.as_dict()["tiles"] is None
    predictor = NearSighted()
    found = evaluate_model(predictor, data, num_bootstrap=0, tiles="300x200", tile_overlap=0.25)
    assert predictor.sizes[:2] == [(700, 400), (300, 200)]
    assert predictor.sizes[-1] == (100, 80)
    assert found.metrics["AP"] == pytest.approx(1)
    assert found.counts["detections"] == found.counts["objects"] == 4
    assert found.as_dict()["tiles"] == {"size": [300, 200], "overlap": 0.25}
    assert any("300 x 200" in note for note in found.notes)
    with pytest.raises(ValueError, match="tiles='abc'"):
        evaluate_model(predictor, data, tiles="abc")


def test_a_model_is_evaluated_on_the_tiles_of_its_training(tmp_path):
    data, predictor = large_scene(tmp_path), NearSighted()
    training = {"tiles": {"size": [300, 200], "overlap": 0.25}}
    predictor.model = SimpleNamespace(config=SimpleNamespace(provenance={"training": training}))
    assert evaluate_model(predictor, data, num_bootstrap=0).tiling == ((300, 200), 0.25)
    assert evaluate_model(predictor, data, num_bootstrap=0, tile_overlap=0.5).tiling == ((300, 200), 0.5)
    assert evaluate_model(predictor, data, num_bootstrap=0, tiles=250).tiling == ((250, 250), 0.2)
    assert evaluate_model(predictor, data, num_bootstrap=0, tiles="none").tiling is None
