"""Non-maximum suppression, `nms.py`, and the setting `nms` of the image processors."""

import json

import pytest

from dino_hf import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from dino_hf.model.nms import NmsSettings, read_nms

SOFT = {"method": "soft", "iou_threshold": 0.8, "min_score": 1e-3, "candidates": 900}

both_backends = pytest.mark.parametrize("make", [DinoDetrImageProcessor, DinoDetrImageProcessorPil])


@both_backends
def test_the_setting_is_saved_and_loaded(make, tmp_path):
    make(nms=SOFT).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["nms"] == SOFT
    assert make.from_pretrained(tmp_path).nms == SOFT


@both_backends
def test_the_default_is_no_suppression_and_adds_nothing_to_the_file(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert "nms" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert read_nms(make.from_pretrained(tmp_path).nms) is None


def test_only_the_method_is_needed():
    assert read_nms({"method": "soft"}) == NmsSettings("soft", 0.8, 1e-3, None)


@both_backends
@pytest.mark.parametrize(
    ("setting", "fact"),
    [
        (3, "nms=3 .*dictionary"),
        (True, "nms=True .*dictionary"),
        ({}, "method=None"),
        ({"method": "greedy"}, "method='greedy'.*soft.*hard"),
        ({"method": "soft", "iou": 0.5}, r"\['iou'\].*iou_threshold"),
        ({"method": "soft", "iou_threshold": 0}, "iou_threshold=0"),
        ({"method": "hard", "iou_threshold": 1.1}, r"iou_threshold=1\.1"),
        ({"method": "soft", "iou_threshold": float("nan")}, "iou_threshold=nan"),
        ({"method": "soft", "iou_threshold": "0.8"}, "iou_threshold='0.8'"),
        ({"method": "soft", "min_score": -1}, "min_score=-1"),
        ({"method": "hard", "min_score": 0.1}, "min_score.*soft"),
        ({"method": "soft", "candidates": 0}, "candidates=0"),
        ({"method": "soft", "candidates": 2.5}, r"candidates=2\.5"),
        ({"method": "soft", "candidates": True}, "candidates=True"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(make, setting, fact):
    with pytest.raises(ValueError, match=fact):
        make(nms=setting)
