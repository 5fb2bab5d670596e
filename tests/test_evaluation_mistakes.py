"""Confusions and mistakes of a small example, counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dino_hf.evaluation import mistakes_page
from dino_hf.evaluation.curves import Best
from dino_hf.evaluation.mistakes import NUM_MISTAKES, confusion_matrix, find_mistakes
from dino_hf.evaluation.result import Evaluation, _confusion

CAT, DOG, EEL = 3, 7, 8


def columns(rows, last):
    """Rows of (image id, category id, box, score or iscrowd)."""
    image_id, labels, boxes, values = zip(*rows, strict=True) if rows else ((), (), (), ())
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    result = {"image_id": np.array(image_id, dtype=int), "labels": np.array(labels, dtype=int), "boxes": boxes}
    result[last] = np.array(values)
    return result | ({"area": boxes[:, 2:].prod(axis=1)} if last == "iscrowd" else {})


TRUTH = columns(
    [
        (1, CAT, (10, 10, 20, 30), 0),
        (1, DOG, (60, 10, 30, 20), 0),
        (2, DOG, (0, 0, 40, 50), 0),
        (2, EEL, (50, 60, 10, 12), 0),
        (4, CAT, (0, 0, 80, 60), 1),
    ],
    "iscrowd",
)
FOUND = columns(
    [
        (1, CAT, (10, 10, 30, 40), 0.9),  # right
        (1, CAT, (11, 10, 30, 40), 0.8),  # duplicate
        (1, CAT, (60, 10, 90, 29), 0.7),  # wrong class: a dog
        (2, DOG, (0, 0, 40, 15), 0.75),  # poor localisation: IoU 0.3
        (3, EEL, (5, 5, 25, 45), 0.6),  # background
        (3, DOG, (50, 5, 70, 45), 0.1),  # below the threshold
        (4, CAT, (5, 5, 15, 20), 0.95),  # in a crowd of cats
    ],
    "scores",
)


def test_confusions_are_counted_as_by_hand():
    counts = confusion_matrix(TRUTH, FOUND, [CAT, DOG, EEL], 0.5)
    wanted = [
        [1, 0, 0, 0],  # the cat
        [1, 0, 0, 1],  # the dog that was taken for a cat, and the one whose box is poor
        [0, 0, 0, 1],
        [1, 1, 1, 0],  # duplicate, poor box, nothing there; what lies in a crowd does not count
    ]
    assert counts.tolist() == wanted
    counts = confusion_matrix(TRUTH, FOUND, [CAT, DOG, EEL], 0.95)  # a score of the threshold is not above it
    assert counts.tolist() == [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_the_highest_overlap_is_paired_first_and_of_equal_ones_the_right_class():
    found = columns([(1, DOG, (10, 10, 30, 40), 0.9), (1, CAT, (10, 10, 30, 40), 0.6)], "scores")
    truth = columns([(1, CAT, (10, 10, 20, 30), 0)], "iscrowd")
    assert confusion_matrix(truth, found, [CAT, DOG], 0.5).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    found["boxes"][1, 0] += 1
    assert confusion_matrix(truth, found, [CAT, DOG], 0.5).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_each_mistake_is_of_its_kind():
    mistakes = {mistake.kind: mistake for mistake in find_mistakes(TRUTH, FOUND, 0.5, limit=3)}
    assert {kind: (mistake.score, mistake.truth) for kind, mistake in mistakes.items() if kind != "miss"} == {
        "duplicate": (0.8, 0),
        "wrong class": (0.7, 1),
        "poor localisation": (0.75, 2),
        "background": (0.6, None),
    }
    misses = [mistake for mistake in find_mistakes(TRUTH, FOUND, 0.5, limit=3) if mistake.kind == "miss"]
    # the largest of each image, and no crowd: the dog of image 2, then that of image 1
    assert [(mistake.image_id, mistake.category_id, mistake.box) for mistake in misses] == [
        (2, DOG, (0, 0, 40, 50)),
        (1, DOG, (60, 10, 90, 30)),
    ]


def test_the_worst_come_first_and_no_more_than_asked_for():
    rows = [(image_id, CAT, (5, 5, 25, 45), image_id / 10) for image_id in range(1, 10)]
    mistakes = find_mistakes(columns([], "iscrowd"), columns(rows, "scores"), 0.15, limit=3)
    assert [mistake.score for mistake in mistakes] == [0.9, 0.8, 0.7]
    assert len(find_mistakes(columns([], "iscrowd"), columns(rows, "scores"), 0.75, limit=3)) == 2


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_model_that_finds_nothing_has_missed_everything(is_empty):
    truth = columns([], "iscrowd") if is_empty else TRUTH
    counts = confusion_matrix(truth, columns([], "scores"), [CAT, DOG, EEL], 0.5)
    assert counts[:, -1].tolist() == ([0] * 4 if is_empty else [1, 2, 1, 0])
    assert counts.sum() == counts[:, -1].sum()


def test_a_panel_shows_what_it_is_about_and_a_few_others():
    axes = Figure().subplots()
    boxes = np.array([[10.0 + number, 10, 60 + number, 50] for number in range(30)])
    texts = [f"class {number}" for number in range(30)]
    is_it = np.arange(30) == 17
    crop = (0, 0, 120, 90)
    hidden = mistakes_page.draw_panel(axes, Image.new("RGB", (120, 90)), crop, boxes, texts, is_it, "#0072B2")
    assert hidden == 30 - 1 - 4
    assert len(axes.patches) == 2 * 5
    assert axes.texts[0].get_text() == "class 17"
    few = mistakes_page.draw_panel(
        Figure().subplots(), Image.new("RGB", (120, 90)), crop, boxes[:5], texts[:5], is_it[13:18], "#0072B2"
    )
    assert few == 0


def test_the_width_of_a_text_is_that_of_its_letters():
    assert 3 < mistakes_page._text_width("WWWW") / mistakes_page._text_width("iiii") < 5


@pytest.mark.parametrize(
    ("shift", "is_paired"), [(10.0, True), (10.01, False)]
)  # of 30 pixels: IoU 0.5, and a little less
def test_objects_are_found_from_an_iou_of_a_half(shift, is_paired):
    truth = columns([(1, CAT, (0, 0, 30, 10), 0)], "iscrowd")
    for label, kind in ((CAT, "poor localisation"), (DOG, "background")):
        found = columns([(1, label, (shift, 0, 30 + shift, 10), 0.9)], "scores")
        counts = confusion_matrix(truth, found, [CAT, DOG], 0.5)
        assert (counts[0, int(label != CAT)] == 1) == is_paired
        paired = ["wrong class", "miss"] if label == DOG else []
        mistakes = [mistake.kind for mistake in find_mistakes(truth, found, 0.5, limit=3)]
        assert mistakes == (paired if is_paired else [kind, "miss"])


@pytest.mark.parametrize(
    ("shift", "kind"), [(9.0, "poor localisation"), (9.01, "background")]
)  # of 11: IoU 0.1, and less
def test_a_box_is_poor_from_an_iou_of_a_tenth(shift, kind):
    truth = columns([(1, CAT, (0, 0, 11, 10), 0)], "iscrowd")
    found = columns([(1, CAT, (shift, 0, 11 + shift, 10), 0.9)], "scores")
    assert [mistake.kind for mistake in find_mistakes(truth, found, 0.5, limit=3)] == [kind, "miss"]


@pytest.mark.parametrize(
    ("right", "is_forgiven"), [(40.0, True), (40.1, False)]
)  # half of it lies in the crowd, and less
def test_a_crowd_forgives_what_lies_in_it_by_half(right, is_forgiven):
    truth = columns([(1, CAT, (0, 0, 20, 50), 1)], "iscrowd")
    found = columns([(1, CAT, (0, 0, right, 10), 0.9)], "scores")
    assert confusion_matrix(truth, found, [CAT], 0.5).sum() == (not is_forgiven)
    mistakes = find_mistakes(truth, found, 0.5, limit=3)
    assert [mistake.kind for mistake in mistakes] == ([] if is_forgiven else ["background"])


def test_the_page_has_four_mistakes_of_a_kind():
    assert NUM_MISTAKES == 4


def test_a_confusion_matrix_of_more_than_100_classes_is_written_as_its_cells():
    counts = np.zeros((102, 102), dtype=np.int64)
    counts[3, 101] = 7
    assert _confusion(counts[1:, 1:]) == {"counts": counts[1:, 1:].tolist()}  # 100 classes and the background
    assert _confusion(counts) == {"cells": [[3, 101, 7]]}


def test_without_detections_the_threshold_is_a_half():
    assert Evaluation.threshold.fget(SimpleNamespace(best=None)) == 0.5
    assert Evaluation.threshold.fget(SimpleNamespace(best=Best(0.3, 0.7, 0.6, 0.8))) == 0.3


@pytest.mark.parametrize("name", ["BloodImage_00016.jpg", "n" * 10_000, "猫"])
@pytest.mark.parametrize("end", ["", " 0.74 (+123 more)"])
def test_titles_of_neighbouring_panels_do_not_meet(name, end):
    title = mistakes_page.panel_title(name, end)
    assert title.endswith(end)
    assert len(title) <= 25
