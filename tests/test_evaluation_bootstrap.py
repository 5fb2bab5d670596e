"""Resamples by weights give what pycocotools gives for the images drawn; intervals are where the number is."""

import numpy as np
import pytest

from dino_hf.evaluation import bootstrap
from dino_hf.evaluation.bootstrap import (
    centre,
    check_memory,
    check_num_bootstrap,
    draw_images,
    interval,
    mean_over_classes,
    num_images_of,
    precision_at_recalls,
    resample,
)
from dino_hf.evaluation.coco import evaluate_class, summarize
from dino_hf.evaluation.matching import SIZES, class_matches
from evaluation_toys import hard_columns

IMAGES = np.arange(1, 8)


def matches_of(truth, found, image_ids=IMAGES):
    evaluation = evaluate_class(truth, found)
    return class_matches(evaluation, image_ids), evaluation.eval


def by_pycocotools(precision):
    return np.where(precision < 0, np.nan, precision)


def test_weights_of_one_give_pycocotools_precision_to_the_last_bit():
    num_crowded = 0
    for seed in range(25):
        truth, found = hard_columns(seed)
        matches, result = matches_of(truth, found)
        num_crowded += np.bincount(found["image_id"]).max() > 100
        for area in range(len(SIZES)):
            ours = precision_at_recalls(matches, np.ones((1, len(IMAGES)), dtype=np.int32), area)[0]
            np.testing.assert_array_equal(ours, by_pycocotools(result["precision"][:, :, 0, area, -1]))
        together = np.stack(
            [precision_at_recalls(matches, np.ones((1, 7), np.int32), area)[0] for area in range(4)], axis=-1
        )
        precision = np.repeat(np.nan_to_num(together, nan=-1)[:, :, None, :, None], 3, axis=-1)
        ours = summarize({1: (precision, result["recall"])}, {1: "a"})
        assert ours == summarize({1: (result["precision"], result["recall"])}, {1: "a"})
    assert num_crowded > 3


def repeated(columns, weights):
    """The images as often as they were drawn, under new ids."""
    rows, ids, new_id = [], [], 0
    for image_id, weight in zip(IMAGES, weights, strict=True):
        own = np.flatnonzero(columns["image_id"] == image_id)
        for _ in range(weight):
            new_id += 1
            rows.append(own)
            ids.append(np.full(len(own), new_id))
    return {name: values[np.concatenate(rows)] for name, values in columns.items()} | {"image_id": np.concatenate(ids)}


def test_a_resample_is_what_pycocotools_gives_for_the_images_drawn():
    for seed in range(6):
        truth, found = hard_columns(seed)
        # Equal scores of different images are ranked by image, and a second copy of an image comes later than both.
        found["scores"] = found["scores"] + 1e-6 * np.random.default_rng(seed).permutation(len(found["scores"]))
        matches, _ = matches_of(truth, found)
        weights = draw_images(len(IMAGES), 3, seed)
        assert (weights > 1).any(axis=1).all()
        for index, row in enumerate(weights):
            _, wanted = matches_of(repeated(truth, row), repeated(found, row), np.arange(1, 8))
            for area in range(len(SIZES)):
                ours = precision_at_recalls(matches, weights, area)[index]
                np.testing.assert_array_equal(ours, by_pycocotools(wanted["precision"][:, :, 0, area, -1]))


def test_draws_are_those_of_the_seed_and_of_as_many_images():
    weights = draw_images(11, 50, 3)
    assert (weights.sum(axis=1) == 11).all()
    assert np.array_equal(weights, draw_images(11, 50, 3))
    assert not np.array_equal(weights, draw_images(11, 50, 4))


def test_the_numbers_do_not_depend_on_how_many_resamples_are_in_work(monkeypatch):
    matches = [matches_of(*hard_columns(seed))[0] for seed in range(2)]
    weights = draw_images(len(IMAGES), 30, 0)
    done = []
    whole = resample(matches, weights, lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    assert whole.shape == (30, 2, 6)
    monkeypatch.setattr(bootstrap, "_MAX_ELEMENTS", 700)
    np.testing.assert_array_equal(resample(matches, weights), whole)


def test_the_mean_is_of_the_classes_that_have_objects_in_a_resample():
    samples = np.full((3, 2, 6), np.nan)
    samples[0], samples[1, 1] = [[0.2] * 6, [0.6] * 6], 0.5
    np.testing.assert_allclose(mean_over_classes(samples)[:, 0], [0.4, 0.5, np.nan])


def test_an_interval_is_around_the_estimate():
    samples = np.append(np.random.default_rng(0).normal(0.47, 0.02, 4000), np.nan)
    low, high = interval(samples, 0.43)  # the bias of AP on few objects
    # 0.43 -+ 1.96 * 0.02; the quantiles of 4,000 samples are known to about 0.001
    assert (low, high) == pytest.approx((0.391, 0.469), abs=0.003)
    assert centre(samples, 0.43).mean() == pytest.approx(0.43)


def test_an_interval_holds_the_estimate_and_is_within_what_is_possible():
    lopsided = np.append(np.full(980, 0.5), np.zeros(20))  # their mean lies below their middle
    low, high = interval(lopsided, 0.5)
    assert (low, high) == pytest.approx((0.5, 0.51))
    assert low <= 0.5
    assert interval(np.array([0.0, 0.5, 1.0]), 0.1)[0] == 0
    assert interval(np.array([0.0, 0.5, 1.0]), 0.9)[1] == 1
    assert interval(np.array([-0.4, 0.4]), -0.9, lowest=-1.0)[0] == -1


@pytest.mark.parametrize("num_bootstrap", [-1, 1, 39])
def test_too_few_resamples_are_refused(num_bootstrap):
    with pytest.raises(ValueError, match=rf"num_bootstrap={num_bootstrap} is too low .* at least 40, or 0 for none"):
        check_num_bootstrap(num_bootstrap)
    check_num_bootstrap(0)
    check_num_bootstrap(40)


def test_images_with_objects_are_counted_once_for_all_classes():
    both = [matches_of(*hard_columns(seed))[0] for seed in range(2)]
    images = [set(one.objects[0].tolist()) for one in both]
    assert num_images_of(both)[0] == len(images[0] | images[1]) < len(images[0]) + len(images[1])
    sizes = [len(set(both[0].objects[area].tolist())) for area in (0, 0, 0, 1, 2, 3)]
    assert num_images_of(both[:1]) == sizes
    assert len(set(sizes)) > 1


def test_a_class_without_detections_or_without_objects():
    truth, found = hard_columns(0)
    nothing = {name: values[:0] for name, values in found.items()}
    matches, _ = matches_of(truth, nothing)
    weights = draw_images(len(IMAGES), 5, 0)
    assert set(np.unique(precision_at_recalls(matches, weights, 0)).tolist()) == {0.0}
    matches, _ = matches_of({name: values[:0] for name, values in truth.items()}, found)
    assert np.isnan(resample([matches], weights)).all()
    matches, _ = matches_of({name: values[:0] for name, values in truth.items()}, nothing)
    assert np.isnan(resample([matches], weights)).all()


@pytest.mark.parametrize("num_bootstrap", [10_001, 10**9])
def test_more_resamples_than_help_are_refused(num_bootstrap):
    bootstrap.check_num_bootstrap(10_000)
    with pytest.raises(ValueError, match=rf"num_bootstrap={num_bootstrap} is above 10000.*; use 1000"):
        bootstrap.check_num_bootstrap(num_bootstrap)


def test_resamples_that_do_not_fit_into_memory_are_refused():
    bootstrap.check_memory(1000, 5000, 80)
    bootstrap.check_memory(1000, 100_000, 1000)
    with pytest.raises(
        ValueError, match=r"10000 resamples of 100000 images and 1000 classes need 4.2 GiB; choose num_b"
    ):
        bootstrap.check_memory(10_000, 100_000, 1000)


def test_40_to_10_000_resamples_give_intervals():
    for num_bootstrap in (0, 40, 10_000):
        check_num_bootstrap(num_bootstrap)
    for num_bootstrap in (1, 39, 10_001):
        with pytest.raises(ValueError, match=f"num_bootstrap={num_bootstrap} is"):
            check_num_bootstrap(num_bootstrap)


def test_resamples_take_2_gib_at_most():
    check_memory(1, 2**29, 0)
    with pytest.raises(ValueError, match="choose num_bootstrap 40, or 0"):
        check_memory(1, 2**29 + 1, 0)
    # 4 bytes of each image and 8 of each of the six numbers of a class: 4,960 for each resample
    check_memory(432_960, 40, 100)
    with pytest.raises(ValueError, match=r"need 2\.0 GiB; choose num_bootstrap 432900, or 0"):
        check_memory(432_961, 40, 100)


def test_an_interval_holds_the_middle_95_hundredths():
    samples = np.linspace(0.3, 0.7, 1001)
    assert interval(samples, 0.5) == pytest.approx((0.31, 0.69), abs=1e-6)
