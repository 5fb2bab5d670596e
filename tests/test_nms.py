"""Non-maximum suppression, `nms.py`, and the setting `nms` of the image processors."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_hf import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from dino_hf.model import nms as nms_module
from dino_hf.model.nms import NmsSettings, read_nms, suppress, with_candidates
from soft_nms_reference import hard_nms, soft_nms

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


def crowded(count, num_classes, seed, spread=0.1, dtype=torch.float64):
    """Detections of one image, highest score first: boxes around a few places, so that many overlap."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(max(1, count // 8), 4, generator=generator, dtype=dtype) * 0.5 + 0.2
    noise = spread * (torch.rand(count, 4, generator=generator, dtype=dtype) - 0.5)
    boxes = places[torch.randint(len(places), (count,), generator=generator)] * (1 + noise)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
    scores = torch.rand(count, generator=generator, dtype=dtype).sort(descending=True).values
    return scores, torch.randint(num_classes, (count,), generator=generator), corners


def as_lists(detections):
    return [values.tolist() for values in detections]


CROWDS = {"count": st.integers(0, 60), "num_classes": st.sampled_from([1, 3, 1203]), "seed": st.integers(0, 2**16)}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    **CROWDS,
    spread=st.floats(0, 0.5),
    iou_threshold=st.floats(0.05, 1),
    min_score=st.sampled_from([0, 1e-3, 0.2, 0.99]),
)
def test_soft_nms_takes_one_detection_after_the_other(count, num_classes, seed, spread, iou_threshold, min_score):
    detections = crowded(count, num_classes, seed, spread)
    expected = soft_nms(*as_lists(detections), iou_threshold, min_score)
    kept, scores = suppress(NmsSettings("soft", iou_threshold, min_score), *detections)
    assert len(kept) == len(expected)
    # Equal scores, for example 0 of boxes that are equal, may come in another order.
    assert sorted(kept.tolist()) == sorted(index for index, _ in expected)
    torch.testing.assert_close(scores, torch.tensor([score for _, score in expected], dtype=torch.float64))
    by_index = dict(expected)
    torch.testing.assert_close(scores, torch.tensor([by_index[index] for index in kept.tolist()], dtype=torch.float64))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(**CROWDS, iou_threshold=st.floats(0.05, 0.95))
def test_hard_nms_drops_what_a_better_detection_overlaps(count, num_classes, seed, iou_threshold):
    detections = crowded(count, num_classes, seed)
    kept, scores = suppress(NmsSettings("hard", iou_threshold), *detections)
    assert kept.tolist() == hard_nms(*as_lists(detections), iou_threshold)
    assert torch.equal(scores, detections[0][kept])


def test_many_detections_are_compared_class_by_class_with_the_same_result(monkeypatch):
    detections = crowded(300, 7, seed=1, dtype=torch.float32)
    expected = suppress(NmsSettings("soft"), *detections)
    monkeypatch.setattr(nms_module, "_BLOCK", 16)
    for found, values in zip(suppress(NmsSettings("soft"), *detections), expected, strict=True):
        assert torch.equal(found, values)


def test_of_equal_scores_the_first_detection_wins():
    scores, labels = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1, 1, 0])
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6]]).expand(3, 4)
    for method, expected in (("soft", [0, 2]), ("hard", [0, 2])):
        assert suppress(NmsSettings(method), scores, labels, boxes)[0].tolist() == expected


def test_without_overlap_low_scores_are_dropped_but_the_best_stays():
    boxes = torch.tensor([[0, 0, 0.1, 0.2], [0.5, 0.5, 0.6, 0.7], [0.8, 0, 0.9, 0.1]])
    labels = torch.tensor([0, 0, 1])
    assert suppress(NmsSettings("soft"), torch.tensor([0.3, 0.001, 0.0009]), labels, boxes)[0].tolist() == [0, 1]
    assert suppress(NmsSettings("soft"), torch.tensor([4e-4, 3e-4, 2e-4]), labels, boxes)[0].tolist() == [0]


@pytest.mark.parametrize("method", ["soft", "hard"])
def test_nan_and_empty_boxes_suppress_nothing(method):
    nan = float("nan")
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6]] * 3 + [[nan] * 4, [0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.3]])
    scores = torch.tensor([nan, 0.9, 0.8, 0.7, 0.6, 0.5])
    kept, found = suppress(NmsSettings(method), scores, torch.zeros(6, dtype=torch.int64), boxes)
    if method == "soft":
        assert kept.tolist() == [0, 1, 3, 4, 5]
        assert found[0].isnan()
    else:  # torchvision takes a NaN for the best score
        assert set(kept.tolist()) >= {3, 4, 5}


def make_outputs(num_images=3, queries=50, classes=4, seed=0, dtype=torch.float32):
    """Outputs of crowded boxes; the last image is empty: all its scores are tiny."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_images, queries, classes, generator=generator) - 2
    logits[-1] -= 20
    places = torch.rand(num_images, 5, 4, generator=generator) * 0.8 + 0.1
    boxes = places.repeat(1, queries // 5, 1) * (1 + 0.05 * torch.randn(num_images, queries, 4, generator=generator))
    return SimpleNamespace(logits=logits.to(dtype), pred_boxes=boxes.to(dtype))


@pytest.mark.parametrize("nms", [SOFT, {"method": "hard", "iou_threshold": 0.6}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_detections_of_an_image_do_not_depend_on_the_batch(nms, dtype):
    processor, outputs = DinoDetrImageProcessor(nms=nms), make_outputs(dtype=dtype)
    sizes = [(60, 110), (900, 70), (31, 33)]
    together = processor.post_process_object_detection(outputs, 0.0, sizes)
    for index, found in enumerate(together):
        one = SimpleNamespace(logits=outputs.logits[[index]], pred_boxes=outputs.pred_boxes[[index]])
        alone = processor.post_process_object_detection(one, 0.0, [sizes[index]])[0]
        for name, values in alone.items():
            assert torch.equal(found[name], values)
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert len(together[0]["scores"]) > 20


def test_soft_nms_clamps_boxes_to_the_image_before_it_compares_them():
    """Outside of the image the two boxes differ, inside they are equal."""
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 0.4], [0.0, 0.5, 1.0, 0.4]]])
    outputs = SimpleNamespace(logits=torch.tensor([[[2.0], [1.0]]]), pred_boxes=boxes)
    found = DinoDetrImageProcessor(nms=SOFT).post_process_object_detection(outputs, 0.0, [(50, 80)])[0]
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 15, 40, 35]]))
    hard = DinoDetrImageProcessor().post_process_object_detection(outputs, 0.0, [(50, 80)], nms={"method": "hard"})[0]
    torch.testing.assert_close(hard["boxes"], torch.tensor([[0.0, 15, 40, 35], [-40, 15, 40, 35]]))


def test_the_argument_comes_before_the_setting():
    outputs = make_outputs()
    with_nms, without = DinoDetrImageProcessor(nms=SOFT), DinoDetrImageProcessor()
    expected = without.post_process_object_detection(outputs, 0.0)
    for found, plain in zip(with_nms.post_process_object_detection(outputs, 0.0, nms=False), expected, strict=True):
        assert torch.equal(found["scores"], plain["scores"])
    expected = with_nms.post_process_object_detection(outputs, 0.0)
    for found, soft in zip(without.post_process_object_detection(outputs, 0.0, nms=SOFT), expected, strict=True):
        assert torch.equal(found["scores"], soft["scores"])
    with pytest.raises(ValueError, match="method='greedy'"):
        without.post_process_object_detection(outputs, nms={"method": "greedy"})


@pytest.mark.parametrize(
    ("top_k", "candidates", "count"), [(300, 7, 7), (5, 60, 5), (300, None, 50), (300, 10**6, 200)]
)
def test_candidates_and_top_k_both_limit_the_detections(top_k, candidates, count):
    nms = {"method": "hard", "iou_threshold": 1, "candidates": candidates}
    found = DinoDetrImageProcessor(nms=nms).post_process_object_detection(make_outputs(), -1, top_k=top_k)
    assert [len(image["scores"]) for image in found] == [count] * 3


def test_rows_beyond_the_last_detection_are_marked():
    outputs = make_outputs()
    top = DinoDetrImageProcessor(nms=SOFT).top_detections(outputs, [(50, 80)] * 3)
    assert top["scores"].shape == (3, 200)  # 50 queries of 4 classes
    counts = (top["labels"] >= 0).sum(1).tolist()
    assert counts[2] == 1  # the image without objects keeps its best detection
    for index, count in enumerate(counts):
        assert (top["scores"][index, :count] > 0).all()
        assert (top["labels"][index, count:] == -100).all()
        assert not top["scores"][index, count:].any()
        assert not top["boxes"][index, count:].any()
        rows = torch.arange(3)[index], top["queries"][index, :count], top["labels"][index, :count]
        # Suppression only lowers scores.
        assert (top["scores"][index, :count] <= outputs.logits.sigmoid()[rows] + 1e-6).all()


def test_more_than_300_detections_get_more_candidates():
    assert with_candidates(None, 900, 50) is None
    assert with_candidates(SOFT, 300, 50) is None
    assert with_candidates(SOFT, 900, 50) is None
    assert with_candidates(SOFT, 901, 50) == SOFT | {"candidates": 901}
    assert with_candidates({"method": "soft"}, 901, 900) == {"method": "soft", "candidates": 901}
    assert with_candidates({"method": "soft", "candidates": 40}, 300, 900) is None


def test_hard_nms_without_torchvision_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(nms_module, "is_torchvision_available", lambda: False)
    outputs = make_outputs()
    with pytest.raises(ImportError, match="Hard NMS needs torchvision"):
        DinoDetrImageProcessorPil(nms={"method": "hard"}).post_process_object_detection(outputs)
    assert len(DinoDetrImageProcessorPil(nms=SOFT).post_process_object_detection(outputs)) == 3
