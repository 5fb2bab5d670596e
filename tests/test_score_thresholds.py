"""The default thresholds of `predict`: from the configuration, the report of training, or 0.5."""

import json
import shutil

import numpy as np
import pytest
from transformers import RTDetrConfig

from dino_hf import DinoDetrConfig
from dino_hf.inference import Predictor, predict
from dino_hf.inference.score_thresholds import ScoreThresholds, score_thresholds
from helpers import tiny_config
from inference_toys import NAMES, noise, save_toy_detector, toy_detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy_detector(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def image():
    return noise(90, 60, 3)


def write_report(folder, threshold, model=None):
    content = {"model": str(model or folder), "best_threshold": {"threshold": threshold}}
    (folder / "results.json").write_text(json.dumps(content))


def test_the_configuration_comes_before_the_report_and_the_report_before_the_default(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = DinoDetrConfig.from_pretrained(copy)
    assert score_thresholds(config, copy) == ScoreThresholds(0.5, {}, None)
    write_report(copy, 0.31)
    assert score_thresholds(config, copy) == ScoreThresholds(0.31, {}, str(copy / "results.json"))
    assert score_thresholds(config).default == 0.5  # the model may have been trained since it was loaded
    config.set_thresholds(None, {"box": 0.2})
    assert score_thresholds(config, copy)[:2] == (0.5, {"box": 0.2})
    config.set_thresholds(0.4)
    assert score_thresholds(config, copy)[:2] == (0.4, {})
    sentence = ScoreThresholds(0.4, {"box": 0.2}, "the model's configuration").describe()
    assert "0.400" in sentence
    assert "1 class has its own" in sentence


@pytest.mark.parametrize("report", ["", "[]", '{"model": "x"}', "[" * 10**5, "another", 1.5, "0.3"])
def test_damaged_reports_and_reports_on_other_models_are_ignored(folder, tmp_path, report):
    copy = shutil.copytree(folder, tmp_path / "model")
    if report == "another":
        write_report(copy, 0.3, folder)
    elif report in (1.5, "0.3"):
        write_report(copy, report)
    else:
        (copy / "results.json").write_text(report)
    assert score_thresholds(DinoDetrConfig.from_pretrained(copy), copy).origin is None


def test_other_detectors_have_no_thresholds():
    config = RTDetrConfig(score_threshold=0.2, class_score_thresholds={"box": 3})
    assert score_thresholds(config) == ScoreThresholds(0.5, {}, None)


@pytest.mark.parametrize("settings", [{}, {"tiles": 50}, {"tta": True}, {"all_scores": True}], ids=str)
def test_predict_uses_the_thresholds_of_the_model_and_those_of_the_user_replace_them(image, settings):
    model, processor = toy_detector()
    predictor = Predictor(model, processor)
    everything = predict(predictor, image, threshold=0.0, **settings)[0]
    name = everything.names[-1]
    middle = float(np.median(everything.scores))
    own = {name: 0.0}
    model.config.set_thresholds(middle, own)
    said = []
    found = predict(predictor, image, say=said.append, **settings)[0]
    expected = predict(predictor, image, threshold=middle, class_thresholds=own, **settings)[0]
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert (found.scores[[one == name for one in found.names]] <= middle).any()
    assert [sentence[:21] for sentence in said] == [f"Score threshold {middle:.3f}"]
    replaced = predict(predictor, image, threshold=middle, say=said.append, **settings)[0]
    assert (replaced.scores > middle).all()
    assert len(replaced.scores) < len(found.scores)
    assert len(said) == 1
    single = predict(predictor, image, class_thresholds={name: middle}, **settings)[0]
    np.testing.assert_array_equal(single.boxes, replaced.boxes)


def test_a_saved_prediction_records_the_thresholds_and_is_resumed_with_the_same_ones(image, tmp_path):
    model, processor = toy_detector()
    predictor = Predictor(model, processor)
    image.save(tmp_path / "a.png")
    noise(60, 90, 4).save(tmp_path / "b.png")
    model.config.set_thresholds(0.02, {"box": 0.01})
    predict(predictor, tmp_path / "a.png", save=tmp_path / "out", formats=["csv"])
    assert len(predict(predictor, [tmp_path / "b.png"], save=tmp_path / "out", formats=["csv"], resume=True)) == 1
    model.config.set_thresholds(0.03)
    with pytest.raises(ValueError, match="threshold"):
        predict(predictor, tmp_path / "b.png", save=tmp_path / "out", formats=["csv"], resume=True)


def test_the_folder_of_a_model_keeps_its_thresholds(tmp_path):
    model, processor = toy_detector()
    model.config.set_thresholds(0.25, {"star": 0.1})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert Predictor(tmp_path).thresholds[:2] == (0.25, {"star": 0.1})
    assert "score_threshold" not in tiny_config().to_diff_dict()
    assert "class_score_thresholds" not in json.loads(tiny_config().to_json_string())


def test_other_classes_remove_the_thresholds():
    def measured():
        config = tiny_config(id2label=NAMES)
        config.set_thresholds(0.25, {"star": 0.1})
        return config

    config = measured()
    config.set_classes(NAMES, [1, 2, 3, 4, 9])  # the same classes
    assert config.score_threshold == 0.25
    config.set_classes(NAMES | {3: "sun"})
    assert (config.score_threshold, config.class_score_thresholds) == (None, None)
    config = measured()
    config.id2label = {0: "cat"}
    config.set_class_names()  # as a model does
    assert (config.score_threshold, config.class_score_thresholds) == (None, None)
    config = DinoDetrConfig.from_dict(measured().to_dict(), num_labels=3)
    assert (config.score_threshold, config.class_score_thresholds) == (None, None)
    assert DinoDetrConfig.from_dict(measured().to_dict(), num_labels=5).score_threshold == 0.25
