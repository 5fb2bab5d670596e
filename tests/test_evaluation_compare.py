"""A paired comparison: a model is no better than itself, a clearly better one is found, a lucky one is not."""

import json

import pytest

from dino_hf.evaluation import compare, evaluate_model
from dino_hf.training import CocoData
from evaluation_toys import ReadyPredictor, draw_blocks, noisy_answers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_blocks(tmp_path_factory.mktemp("data") / "blocks", ["cat", "dog", "unused"], 30, unused=1)


def evaluated(data, seed=0, num_bootstrap=300, **noise):
    answers = noisy_answers(data, seed, **noise)
    return evaluate_model(
        ReadyPredictor(data.id2label, answers, name=f"model {seed}"), data, num_bootstrap=num_bootstrap
    )


def test_a_model_is_not_better_than_itself(data):
    comparison = compare(evaluated(data), evaluated(data))
    assert comparison.verdict == "No difference can be shown: +0.000 AP [0.000, 0.000]"
    for entry in comparison.differences:
        assert (entry.difference, entry.interval, entry.share_better, entry.is_shown) == (0, (0, 0), 0, False)
    names = [entry.name for entry in comparison.differences]
    assert names[:3] == ["AP", "AP50", "AP75"]
    assert names[-2:] == ["AP_class_cat", "AP_class_dog"]  # and none of the class without objects


def test_a_clearly_better_model_is_found_and_the_other_way_round(data):
    worse, better = evaluated(data, 0, noise=5), evaluated(data, 1, noise=0.5, missed=0.05)
    comparison = compare(worse, better)
    ap = comparison.differences[0]
    low, high = ap.interval
    assert 0 < low < ap.difference < high
    assert ap.share_better == 1
    assert comparison.verdict == f"B is better: +{ap.difference:.3f} AP [{low:.3f}, {high:.3f}]"
    assert repr(comparison) == f"Comparison({comparison.verdict}, {len(comparison.differences)} differences)"
    back = compare(better, worse)
    assert back.verdict.startswith(f"A is better: B has -{ap.difference:.3f} AP [")
    assert back.differences[0].interval == pytest.approx((-high, -low))
    assert back.differences[0].share_better == 0
    assert json.loads(json.dumps(comparison.as_dict()))["differences"][0]["share_b_better"] == 1


def test_another_draw_of_the_same_model_is_no_better(data):
    comparison = compare(evaluated(data, 2), evaluated(data, 3))
    ap = comparison.differences[0]
    assert comparison.verdict.startswith("No difference can be shown: ")
    assert ap.interval[0] < 0 < ap.interval[1]
    assert 0 < ap.share_better < 1


def test_only_what_was_measured_alike_is_compared(data, tmp_path):
    other = draw_blocks(tmp_path / "other", ["cat", "dog", "unused"], 30, seed=1)
    a = evaluated(data)
    with pytest.raises(ValueError, match=r"have different data.* Evaluate both detectors on the same images"):
        compare(a, evaluated(other))
    with pytest.raises(
        ValueError, match=r"have 300 resamples with seed 0 and 40 with seed 0. Evaluate both with the same"
    ):
        compare(a, evaluated(data, num_bootstrap=40))
    with pytest.raises(ValueError, match="above 0"):
        compare(evaluated(data, num_bootstrap=0), evaluated(data, num_bootstrap=0))


def without_objects(data, image_indices):
    objects = list(data.dataset["objects"])
    for index in image_indices:
        objects[index] = {name: [] for name in objects[index]}
    feature = data.dataset.features["objects"]
    return data._replace(dataset=data.dataset.remove_columns("objects").add_column("objects", objects, feature=feature))


@pytest.mark.parametrize("empty", [[0, 1, 2], [0, 2]])
def test_with_objects_in_fewer_than_two_images_nothing_can_be_compared(tmp_path, empty):
    data = without_objects(draw_blocks(tmp_path / "blocks", ["cat"], 3), empty)
    a = evaluated(data, num_bootstrap=40)
    assert a.intervals == {}
    with pytest.raises(ValueError, match="only one image or none has annotated objects"):
        compare(a, a)


def test_a_class_in_one_image_is_not_compared_however_large_its_difference(tmp_path):
    data = draw_blocks(tmp_path / "blocks", ["cat"], 4)
    objects = list(data.dataset["objects"])
    objects[1]["category"] = [1] * len(objects[1]["category"])
    feature = data.dataset.features["objects"]
    dataset = data.dataset.remove_columns("objects").add_column("objects", objects, feature=feature)
    data = CocoData(dataset, {0: "cat", 1: "rare"}, [10, 12], "toy")
    b, a = evaluated(data, noise=0, missed=0), evaluated(data, missed=1)
    assert b.metrics["AP_class_rare"] > a.metrics["AP_class_rare"] == 0
    assert "AP_class_cat" in a.intervals
    assert "AP_class_rare" not in a.intervals
    assert "AP_class_rare" not in [entry.name for entry in compare(a, b).differences]
