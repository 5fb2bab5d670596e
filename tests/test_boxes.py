"""Things that are annotated twice: found, and left out of a cleaned copy on request only."""

import json
import time

import numpy as np
import pytest

from broken_data import CASES, break_data
from dino_hf.data.raw import BoxTable
from dino_hf.doctor.boxes import near_repeats, without_near_repeats
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.cleaned_copy import write_cleaned_copy


def table(boxes, image=None, category=None, is_crowd=None) -> BoxTable:
    boxes = np.array(boxes, dtype=np.float64)
    zeros, count = np.zeros(len(boxes), dtype=np.int64), len(boxes)
    return BoxTable(
        boxes,
        zeros if image is None else np.array(image),
        zeros if category is None else np.array(category),
        zeros.astype(bool) if is_crowd is None else np.array(is_crowd),
        np.full(count, np.nan),
        np.full((count, 2), 1000.0),
    )


def test_boxes_of_a_cell_that_is_annotated_twice():
    boxes = [(324, 402, 100, 76), (10, 10, 50, 50), (318, 396, 109, 84)]  # the first and the last: 0.83
    assert near_repeats(table(boxes)).tolist() == [[0, 2]]
    assert near_repeats(table(boxes[::-1])).tolist() == [[0, 2]]
    assert near_repeats(table(boxes, image=[0, 0, 1])).tolist() == []
    assert near_repeats(table(boxes, category=[0, 0, 1])).tolist() == []
    assert near_repeats(table(boxes, is_crowd=[True, False, False])).tolist() == []
    assert near_repeats(table(boxes, image=[-1, -1, -1])).tolist() == []  # of images that are not there


@pytest.mark.parametrize(("width", "is_near"), [(100, False), (124.9, True), (125.1, False)])
def test_four_fifths_of_both_boxes_must_be_shared(width, is_near):
    """Equal boxes are named as such; 100 of 125 are 0.8."""
    assert (len(near_repeats(table([(7, 9, 100, 60), (7, 9, width, 60)]))) == 1) == is_near


def test_all_pairs_are_found():
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(0, 90, (300, 2)), rng.uniform(20, 40, (300, 2))])
    low, high = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
    overlap = (np.minimum(high, high[:, 0]) - np.maximum(low, low[:, 0])).clip(min=0).prod(-1)  # (300, 300)
    areas = boxes[:, 2:].prod(1)
    iou = overlap / (areas[:, None] + areas - overlap)
    expected = [(first, second) for first, second in zip(*np.nonzero(iou >= 0.8), strict=True) if first < second]
    pairs = near_repeats(table(boxes))
    assert len(expected) > 10
    assert sorted(map(tuple, pairs.tolist())) == sorted(expected)
    assert (np.diff(pairs[:, 1]) >= 0).all()


def test_of_a_chain_every_second_box_stays():
    pairs = near_repeats(table([(10 * number, 0, 100, 100) for number in range(4)]))  # neighbours: 0.82
    assert pairs.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert without_near_repeats(pairs, 4).tolist() == [True, False, True, False]


@pytest.mark.parametrize(("count", "spread"), [(250_000, 1000), (60_000, 1e-3)])
def test_many_boxes_in_one_image_take_seconds(count, spread):
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(0, spread, (count, 2)), rng.uniform(30, 30 + spread / 50, (count, 2))])
    start = time.process_time()
    assert len(near_repeats(table(boxes)))
    assert time.process_time() - start < 20


def test_a_cleaned_copy_keeps_them_and_says_so_but_for_a_request(tmp_path):
    case = next(case for case in CASES if case.kind == "near-duplicate-box")
    raw = break_data(case, tmp_path / "data")
    report = inspect(raw)
    count = len(raw.splits["train"].annotations)
    kept = write_cleaned_copy(raw, report, tmp_path / "kept")
    assert (kept.num_boxes["train"], kept.changes) == (count, [])
    assert [text.split(",")[0] for text in kept.kept] == ["1 box of train nearly repeats another box of the same class"]
    dropped = write_cleaned_copy(raw, report, tmp_path / "dropped", drop_near_copies=True)
    assert dropped.num_boxes["train"] == count - 1
    assert [(change.kind, change.where) for change in dropped.changes] == [
        ("near-duplicate-box", f"annotations[{count - 1}]")
    ]
    written = json.loads((tmp_path / "dropped" / "train" / "_annotations.coco.json").read_text())
    assert written["annotations"][-1]["bbox"] == raw.splits["train"].annotations[-2]["bbox"]
