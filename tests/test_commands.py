"""All commands in a row, as a user calls them: the same data in other formats, and under other category ids, are the same data."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_layouts import CATEGORY_IDS, FOUR_FORMATS, draw_splits, write_category_layout, write_layout
from dino_hf import DinoDetrConfig, DinoDetrImageProcessor
from dino_hf.cli.app import app
from helpers import tiny_config

TRAINING = ("--max-steps", "3", "--eval-steps", "3", "--report-to", "none", "--batch-size", "2", "--use-cpu")
EVALUATION = ("--split", "test", "--num-bootstrap", "40", "--device", "cpu")


def call(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result.output


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Scenes of three splits, and a configuration to start from."""
    folder = tmp_path_factory.mktemp("commands")
    splits = draw_splits(folder / "scenes", train=6, validation=4, test=5)
    tiny_config().save_pretrained(folder / "untrained")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 72}).save_pretrained(folder / "untrained")
    return folder, splits


def train_and_evaluate(source, work) -> tuple[dict, list[dict], DinoDetrConfig]:
    """Scores and detections on the test images; the doctor has seen the data before."""
    folder, _ = work
    out = folder / f"out-{source.parent.name if source.is_file() else source.name}"
    call("doctor", source, "--no-images")
    call("train", source, "--model", folder / "untrained", "--output-dir", out, *TRAINING)
    call("eval", out, source, "--output-dir", out / "eval", *EVALUATION)
    results, detections = (
        json.loads((out / "eval" / name).read_text()) for name in ("results.json", "detections.json")
    )
    return results["metrics"], detections, DinoDetrConfig.from_pretrained(out)


def assert_same(found, expected, atol: float) -> None:
    """Scores, and detections under the names of their classes."""
    (metrics, detections, config), (other_metrics, other_detections, other_config) = found, expected
    assert metrics == pytest.approx(other_metrics, abs=atol)
    assert list(config.id2label.values()) == list(other_config.id2label.values())
    assert len(detections) == len(other_detections) > 100
    names = [
        [dict(zip(one.category_ids, one.id2label.values(), strict=True))[entry["category_id"]] for entry in entries]
        for one, entries in ((config, detections), (other_config, other_detections))
    ]
    assert names[0] == names[1]
    for field in ("score", "bbox"):
        values = [np.array([entry[field] for entry in entries]) for entries in (detections, other_detections)]
        np.testing.assert_allclose(*values, rtol=0, atol=100 * atol if field == "bbox" else atol)


@pytest.fixture(scope="module")
def expected(work):
    folder, splits = work
    return train_and_evaluate(write_layout("coco", splits, folder / "coco"), work)


@pytest.mark.parametrize("name", [name for name in FOUR_FORMATS if name != "coco"])
def test_formats_of_the_same_data_train_to_the_same_predictions_and_ap(name, work, expected):
    """Three steps of training, whose images, boxes, classes, order and random numbers must all be the same."""
    folder, splits = work
    found = train_and_evaluate(write_layout(name, splits, folder / name), work)
    # YOLO's text has relative boxes, rounded to six digits and more: three steps carry that into the weights.
    assert_same(found, expected, atol=1e-4 if name == "yolo" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CATEGORY_IDS))
def test_category_ids_of_any_kind_train_to_the_same_ap(name, work, expected):
    folder, splits = work
    found = train_and_evaluate(write_category_layout(name, splits, folder / name), work)
    assert_same(found, expected, atol=0)


def test_what_was_trained_detects_in_images_and_in_pipelines(work, expected):
    from transformers import pipeline

    folder, splits = work
    images = [str(scene.path) for scene in splits["test"]]
    call("predict", folder / "out-coco", *images, "--save", folder / "found", "--threshold", "0.01", "--device", "cpu")
    assert len(list((folder / "found").rglob("*.png"))) == len(images)
    detector = pipeline("object-detection", model=str(folder / "out-coco"), device="cpu")
    with torch.no_grad():
        assert all(detector(images, batch_size=2, threshold=0.0))
