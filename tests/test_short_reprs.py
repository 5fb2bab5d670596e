"""What a notebook prints of a result fits into a few lines, whatever the data are called and however many there are."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_layouts import annotations_of
from dino_hf import DinoDetrForObjectDetection
from dino_hf.data import RawSplit, load_data, read_raw
from dino_hf.doctor import inspect, write_cleaned_copy
from dino_hf.evaluation import compare, evaluate_model
from dino_hf.export import ExportReport
from dino_hf.export.comparison import Difference
from dino_hf.run.preflight import Preflight
from dino_hf.run.training_run import TrainingRun
from dino_hf.training import freeze, transfer_classes
from evaluation_toys import ReadyPredictor, noisy_answers
from helpers import tiny_config

LONGEST = 400
NAMES = [f"{number} {'long name ' * 200}" for number in range(120)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "d"
    for split, number in (("train", 7), ("val", 3)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(number):
            width, height = 40 + index, 30 + index
            Image.new("RGB", (width, height), (index * 20, 90, 200)).save(folder / split / f"{index}.png")
            images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
            box = {"bbox": [1, 2, 20, 15 + index], "area": 20 * (15 + index), "iscrowd": 0}
            annotations += [{"id": index + 1, "image_id": index, "category_id": index, **box}] if index else []
        categories = [{"id": index, "name": name} for index, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def test_results_of_data_are_short(data, tmp_path):
    raw, loaded = read_raw(data), load_data(data)
    report = inspect(raw)
    copy = write_cleaned_copy(raw, report, tmp_path / "copy")
    for one in (raw, loaded, loaded.train, report, copy, *raw.splits.values()):
        assert type(one).__name__ in repr(one)
        assert len(repr(one)) < LONGEST
    assert repr(loaded.train).endswith("7 images, 120 classes)")
    assert "train 7 images, validation 3 images, 120 classes" in repr(loaded)
    assert (
        repr(RawSplit("train", "x", [{}] * 5, annotations_of([{"category_id": 1}] * 9)))
        == "RawSplit('train': 5 images, 9 annotations)"
    )


def test_results_of_evaluation_training_and_export_are_short(data):
    validation = load_data(data).validation
    predictor = ReadyPredictor(validation.id2label, noisy_answers(validation), name="m" * 10_000)
    evaluation = evaluate_model(predictor, validation, num_bootstrap=40)
    model = DinoDetrForObjectDetection(tiny_config())
    content = {
        "origin": "x" * 10**4,
        "images": {"train": 7, "validation": 3, "test": None},
        "classes": dict.fromkeys(NAMES, 3),
    }
    preflight = Preflight(content, {}, {}, None, {}, NAMES)
    results = [
        evaluation,
        compare(evaluation, evaluation),
        transfer_classes(model, dict(enumerate(NAMES))),
        freeze(model, "backbone"),
        preflight,
        TrainingRun(Path("y" * 10**4), preflight, evaluation, None, None),
        ExportReport(Path("z" * 10**4), 2**25, 18, "float32", Difference(1e-6, 2e-7, 30, 3), 0.01, None),
    ]
    for one in results:
        assert type(one).__name__ in repr(one)
        assert len(repr(one)) < LONGEST, repr(one)
    assert repr(preflight) == "Preflight(images train 7, validation 3; 120 classes, 120 warnings)"
