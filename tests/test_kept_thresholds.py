"""The thresholds of an evaluation are kept in the configuration of the model that was evaluated."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

import dino_hf
from dino_hf.common.scenes import make_scenes
from dino_hf.data import load_data
from dino_hf.evaluation import evaluate_model, kept_thresholds
from dino_hf.evaluation.kept_thresholds import best_thresholds, check_keeps_thresholds, keep_thresholds
from dino_hf.inference import Predictor
from evaluation_toys import ReadyPredictor, annotate_with, noisy_answers
from inference_toys import save_toy_detector, toy_detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    annotate_with(save_toy_detector(folder / "model"), folder / "data")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    make_scenes(folder := tmp_path_factory.mktemp("scenes") / "validation", 12, seed=7)
    return load_data(folder.parent).validation


@pytest.fixture(scope="module")
def evaluation(data):
    return evaluate_model(ReadyPredictor(data.id2label, noisy_answers(data, seed=1)), data, num_bootstrap=0)


@pytest.fixture
def model(folder, tmp_path):
    return shutil.copytree(folder / "model", tmp_path / "model")


def test_classes_with_few_objects_have_no_threshold_of_their_own(evaluation, monkeypatch):
    rows = {row["name"]: row for row in evaluation.per_class}
    counts = sorted(row["num_objects"] for row in rows.values())
    monkeypatch.setattr(kept_thresholds, "MIN_OBJECTS", counts[2])
    threshold, by_class = best_thresholds(evaluation)
    assert threshold == evaluation.best_threshold
    assert by_class == {name: row["best_threshold"] for name, row in rows.items() if row["num_objects"] >= counts[2]}
    assert 0 < len(by_class) < 5


def test_classes_have_the_names_of_the_model(data, monkeypatch):
    monkeypatch.setattr(kept_thresholds, "MIN_OBJECTS", 1)
    names = {index: name.upper() for index, name in data.id2label.items()}
    evaluation = evaluate_model(ReadyPredictor(names, noisy_answers(data, seed=1)), data, num_bootstrap=0)
    by_class = best_thresholds(evaluation)[1]
    assert set(by_class) == set(names.values())
    rows = {row["name"].upper(): row["best_threshold"] for row in evaluation.per_class}
    assert by_class == rows


def test_an_evaluation_changes_a_folder_only_on_request(folder, model):
    before = (model / "config.json").read_bytes()
    settings = {"num_bootstrap": 0, "device": "cpu"}
    dino_hf.evaluate(model, folder / "data", **settings)
    assert (model / "config.json").read_bytes() == before
    evaluation = dino_hf.evaluate(model, folder / "data", keep_threshold=True, **settings)
    assert "is kept in" in evaluation.notes[-1]
    after = json.loads((model / "config.json").read_text())
    assert after.pop("score_threshold") == evaluation.best_threshold
    after.pop("class_score_thresholds")
    assert after == json.loads(before)
    assert Predictor(model).thresholds.default == evaluation.best_threshold
    assert not list(model.glob(".*"))


def test_a_given_model_is_changed_in_memory(folder):
    detector, processor = toy_detector()
    predictor = Predictor(detector, processor)
    evaluation = dino_hf.evaluate(predictor, folder / "data", num_bootstrap=0, keep_threshold=True)
    assert detector.config.score_threshold == evaluation.best_threshold


def test_a_file_that_cannot_be_written_stays_as_it_is(evaluation, model, monkeypatch):
    before = (model / "config.json").read_bytes()

    def fail(*names):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    predictor = Predictor(model)
    with pytest.raises(OSError, match="no space"):
        keep_thresholds(evaluation, predictor, model)
    assert (model / "config.json").read_bytes() == before
    assert predictor.model.config.score_threshold is None


def test_models_that_cannot_keep_a_threshold_are_refused_before_the_evaluation(folder, model, tmp_path):
    for settings in ({"split": "train"}, {"allow_trained": True}):
        with pytest.raises(ValueError, match="training images"):
            dino_hf.evaluate(model, folder / "data", keep_threshold=True, **settings)
    with pytest.raises(ValueError, match="owner/detector is no folder on this machine"):
        dino_hf.evaluate("owner/detector", folder / "data", keep_threshold=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    other = YolosForObjectDetection(YolosConfig(**sizes, image_size=[48, 64], num_detection_tokens=12))
    with pytest.raises(ValueError, match="'yolos', whose configuration has no score threshold"):
        dino_hf.evaluate(Predictor(other, YolosImageProcessor()), folder / "data", keep_threshold=True)
    other.save_pretrained(tmp_path / "yolos")
    with pytest.raises(ValueError, match="'yolos', whose configuration has no score threshold"):
        check_keeps_thresholds(tmp_path / "yolos", "validation", False)
    nothing = SimpleNamespace(best=None)
    with pytest.raises(ValueError, match="found no object"):
        keep_thresholds(nothing, Predictor(model), model)
