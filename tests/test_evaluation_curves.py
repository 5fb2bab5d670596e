"""Curves are those of pycocotools, and the best threshold is the one that trying all of them finds."""

import numpy as np
import pytest

from dino_hf.evaluation.coco import evaluate_class
from dino_hf.evaluation.curves import make_curves
from dino_hf.evaluation.matching import class_matches
from evaluation_toys import hard_columns

IMAGES = np.arange(1, 8)


def curves_of(*seeds):
    cases = [hard_columns(seed) for seed in seeds]
    evaluations = [evaluate_class(*case) for case in cases]
    matches = [class_matches(evaluation, IMAGES) for evaluation in evaluations]
    precision = np.stack([evaluation.eval["precision"][0, :, 0, 0, -1] for evaluation in evaluations])
    return make_curves(matches, precision), matches, precision


def counts_above(matches, threshold):
    """(right, kept, objects), counted one by one."""
    is_true, counts = matches.is_true()
    kept = (matches.scores > threshold) & counts
    return (is_true & kept).sum(), kept.sum(), len(matches.objects[0])


def test_precision_is_pycocotools():
    curves, _, precision = curves_of(0, 1)
    np.testing.assert_array_equal(curves.precision, precision)
    np.testing.assert_array_equal(curves.mean_precision, precision.mean(axis=0))


def test_f1_and_its_best_threshold_are_those_of_all_thresholds_tried():
    curves, matches, _ = curves_of(0, 1, 2)

    def f1(chosen, threshold):
        true, kept, objects = np.sum([counts_above(one, threshold) for one in chosen], axis=0)
        return 2 * true / (kept + objects)

    scores = np.unique(np.concatenate([one.scores for one in matches]))
    tried = np.concatenate([[0], (scores[1:] + scores[:-1]) / 2])
    for chosen, line, best in [
        (matches, curves.f1, curves.best),
        (matches[1:2], curves.class_f1[1], curves.class_best[1]),
    ]:
        np.testing.assert_array_equal(line, [f1(chosen, threshold) for threshold in curves.thresholds])
        assert best.f1 == max(f1(chosen, threshold) for threshold in tried) == f1(chosen, best.threshold)
        true, kept, objects = np.sum([counts_above(one, best.threshold) for one in chosen], axis=0)
        assert (best.precision, best.recall) == (true / kept, true / objects)
        assert abs(scores - best.threshold).min() > 0.01  # a score that is rounded stays on its side


def test_without_objects_there_is_no_curve_and_without_detections_no_threshold():
    truth, found = hard_columns(0)
    no_truth, no_found = ({name: values[:0] for name, values in columns.items()} for columns in (truth, found))
    evaluations = [evaluate_class(no_truth, found), evaluate_class(truth, no_found)]
    matches = [class_matches(evaluation, IMAGES) for evaluation in evaluations]
    curves = make_curves(matches, np.stack([one.eval["precision"][0, :, 0, 0, -1] for one in evaluations]))
    assert np.isnan(curves.precision[0]).all()
    assert np.isnan(curves.class_f1[0]).all()
    assert curves.mean_precision.max() == curves.class_f1[1].max() == 0
    assert curves.best is None
    assert curves.class_best == [None, None]
    assert np.isnan(make_curves(matches[:1], -np.ones((1, 101))).mean_precision).all()


def test_the_threshold_lies_between_the_last_score_kept_and_the_next():
    truth = {"image_id": np.array([1]), "boxes": np.array([[10, 10, 20, 30.0]]), "area": np.array([600.0])}
    truth |= {"iscrowd": np.array([0]), "labels": np.array([1])}
    found = {"image_id": np.array([1, 1]), "boxes": np.array([[10, 10, 30, 40.0], [50, 50, 60, 60]])}
    found |= {"scores": np.array([0.8, 0.5]), "labels": np.array([1, 1])}
    evaluation = evaluate_class(truth, found)
    curves = make_curves([class_matches(evaluation, np.array([1]))], evaluation.eval["precision"][:1, :, 0, 0, -1])
    assert curves.best.threshold == pytest.approx(0.65)
    assert curves.best[1:] == (1, 1, 1)
