from collections import UserDict

import numpy as np
import pytest
import torch

from dino_hf.model.targets import PADDING_LABEL, Targets, collect_targets
from helpers import tiny_labels


def collect(labels, batch_size=2, num_labels=5):
    return collect_targets(labels, batch_size, num_labels, "cpu")


def pad(labels: list[dict], largest: int) -> dict:
    class_labels = torch.full((len(labels), largest), PADDING_LABEL)
    boxes = torch.zeros(len(labels), largest, 4)
    for image, target in enumerate(labels):
        class_labels[image, : len(target["boxes"])] = target["class_labels"]
        boxes[image, : len(target["boxes"])] = target["boxes"]
    return {"class_labels": class_labels, "boxes": boxes}


def test_targets_of_all_images_stand_one_after_the_other():
    labels = tiny_labels(3, 0, 2)
    targets = collect(labels, batch_size=3)
    assert targets.counts == (3, 0, 2)
    assert torch.equal(targets.class_labels, torch.cat([target["class_labels"] for target in labels]))
    assert torch.equal(targets.boxes, torch.cat([target["boxes"] for target in labels]))
    assert targets.image.tolist() == [0, 0, 0, 2, 2]
    assert targets.position.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("largest", [3, 7])
def test_padded_labels_are_the_same_targets(largest):
    labels = tiny_labels(3, 0, 2)
    expected, got = collect(labels, batch_size=3), collect(pad(labels, largest), batch_size=3)
    assert got.counts == expected.counts
    assert torch.equal(got.class_labels, expected.class_labels)
    assert torch.equal(got.boxes, expected.boxes)


def test_padding_may_stand_anywhere_in_a_row():
    labels = {"class_labels": torch.tensor([[-100, 1], [2, -100]]), "boxes": torch.rand(2, 2, 4)}
    targets = collect(labels)
    assert targets.class_labels.tolist() == [1, 2]
    assert torch.equal(targets.boxes, labels["boxes"][[0, 1], [1, 0]])


@pytest.mark.parametrize(
    "labels", [tiny_labels(0, 0), {"class_labels": torch.zeros(2, 0), "boxes": torch.zeros(2, 0, 4)}]
)
def test_a_batch_without_boxes_has_empty_targets_of_the_usual_form(labels):
    targets = collect(labels)
    assert targets.counts == (0, 0)
    assert (targets.class_labels.shape, targets.class_labels.dtype) == ((0,), torch.int64)
    assert (targets.boxes.shape, targets.boxes.dtype) == ((0, 4), torch.float32)
    assert targets.image.tolist() == targets.position.tolist() == []


def test_a_batch_without_images_has_no_targets():
    targets = collect([], batch_size=0)
    assert targets.counts == ()
    assert targets.image.tolist() == targets.position.tolist() == []


def test_targets_come_back_as_they_are():
    targets = Targets(torch.tensor([4]), torch.rand(1, 4), (1, 0))
    assert collect(targets) is targets


@pytest.mark.parametrize("wrap", [dict, UserDict])
@pytest.mark.parametrize("convert", [torch.tensor, np.array, list])
def test_any_mapping_of_any_arrays_is_accepted_and_other_keys_are_ignored(wrap, convert):
    target = wrap(class_labels=convert([1, 4]), boxes=convert([[0.5, 0.5, 0.1, 0.2]] * 2), image_id=7, area=None)
    targets = collect([target, target])
    assert targets.class_labels.tolist() == [1, 4, 1, 4]
    assert targets.class_labels.dtype == torch.int64
    assert targets.boxes.dtype == torch.float32


def test_a_box_that_ends_just_above_one_is_rounding():
    boxes = torch.tensor([[0.5, 0.5, 1.00002, 1.0]])
    assert torch.equal(collect([{"class_labels": [0], "boxes": boxes}] * 2).boxes, boxes.repeat(2, 1))


@pytest.mark.parametrize("box", [[1.01, 0.5, 0.1, 0.1], [0.5, 0.5, 0.1, 1.01], [-0.01, 0.5, 0.1, 0.1]])
def test_a_hundredth_beyond_is_no_rounding(box):
    with pytest.raises(ValueError, match=r"labels\[1\], box 0: \[.* is not \(cx, cy, w, h\) in \[0, 1\]"):
        collect([{"class_labels": [], "boxes": torch.zeros(0, 4)}, {"class_labels": [0], "boxes": [box]}])


def change(**changes) -> list[dict]:
    """Good labels of two images whose second has changed entries."""
    good = {"class_labels": torch.tensor([1, 2]), "boxes": torch.full((2, 4), 0.5)}
    return [good, {**good, **changes}]


WRONG = {
    "count": (change()[:1], r"labels for 1 images but pixel_values holds 2.*boxes of shape \(0, 4\)"),
    "padded count": (
        {"class_labels": torch.ones(3, 2).long(), "boxes": torch.full((3, 2, 4), 0.5)},
        "labels for 3 images but pixel_values holds 2",
    ),
    "keys": (
        [change()[0], {"bbox": [], "category_id": []}],
        r"labels\[1\] has the keys \['bbox', 'category_id'\] but needs \['boxes', 'class_labels'\].*ImageProcessor",
    ),
    "one key": ([change()[0], {"boxes": []}], r"labels\[1\] has the keys \['boxes'\] but needs \['class_labels'\]"),
    "box shape": (
        change(boxes=torch.zeros(2, 5)),
        r"labels\[1\]: boxes have shape \(2, 5\) for class_labels of shape \(2,\); expected \(T, 4\)",
    ),
    "box count": (
        change(boxes=torch.zeros(3, 4)),
        r"labels\[1\]: boxes have shape \(3, 4\) for class_labels of shape \(2,\)",
    ),
    "empty boxes": (
        change(class_labels=torch.zeros(0), boxes=torch.zeros(0)),
        r"boxes have shape \(0,\).*needs torch.zeros\(0, 4\)",
    ),
    "class shape": (change(class_labels=torch.ones(2, 1).long()), r"class_labels of shape \(2, 1\)"),
    "class dtype": (change(class_labels=torch.ones(2)), r"labels\[1\]: class_labels have dtype torch.float32; .*int64"),
    "class bool": (change(class_labels=torch.ones(2).bool()), r"labels\[1\]: class_labels have dtype torch.bool"),
    "class complex": (
        change(class_labels=torch.ones(2).cfloat()),
        r"labels\[1\]: class_labels have dtype torch.complex64",
    ),
    "box complex": (change(boxes=torch.ones(2, 4).cfloat()), r"labels\[1\]: boxes have dtype torch.complex64"),
    "a number": (3, "labels is a int, but must be a list with one dictionary per image"),
    "a text": ("ab", r"labels\[0\] is a str, but must be a dictionary"),
    "padded text": (
        {"class_labels": "abc", "boxes": torch.ones(2, 1, 4)},
        r"labels cannot be read as tensors.*\(B, M\)",
    ),
    "padded ragged": (
        {"class_labels": [[1], [1, 2]], "boxes": torch.ones(2, 1, 4)},
        r"labels cannot be read as tensors .*pass class_labels \(B, M\)",
    ),
    "class too high": (
        change(class_labels=torch.tensor([0, 5])),
        r"labels\[1\], box 1: class 5 does not exist.*config.num_labels=5.*num_labels=91",
    ),
    "class negative": (change(class_labels=torch.tensor([-1, 0])), r"labels\[1\], box 0: class -1 does not exist"),
    "pixels": (
        change(boxes=torch.tensor([[0.5, 0.5, 0.1, 0.1], [20.0, 30.0, 10.0, 5.0]])),
        r"labels\[1\], box 1: \[20.0, 30.0, 10.0, 5.0\] is not \(cx, cy, w, h\) in \[0, 1\]. Divide pixels",
    ),
    "negative size": (
        change(boxes=torch.tensor([[0.5, 0.5, -0.1, 0.1]] * 2)),
        r"box 0: \[0.5, 0.5, -0.1, 0.1\] is not",
    ),
    "nan": (change(boxes=torch.full((2, 4), torch.nan)), r"labels\[1\], box 0: \[nan, nan, nan, nan\] is not"),
    "padded keys": (
        {"class_labels": torch.ones(2, 1).long(), "bbox": torch.ones(2, 1, 4)},
        r"one mapping with the keys \['bbox', 'class_labels'\] but needs \['boxes'\].*padded with -100",
    ),
    "padded shape": (
        {"class_labels": torch.ones(2, 3).long(), "boxes": torch.ones(2, 2, 4)},
        r"Padded labels: boxes have shape \(2, 2, 4\) for class_labels of shape \(2, 3\); expected \(B, M, 4\)",
    ),
    "padded rank": (
        {"class_labels": torch.ones(2).long(), "boxes": torch.ones(2, 4)},
        r"Padded labels: boxes have shape \(2, 4\) for class_labels of shape \(2,\)",
    ),
}


@pytest.mark.parametrize(("labels", "message"), WRONG.values(), ids=WRONG)
def test_wrong_labels_are_named_with_their_place_and_a_cure(labels, message):
    with pytest.raises(ValueError, match=message):
        collect(labels)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, r"labels\[1\] is a NoneType, but must be a dictionary"),
        ({"class_labels": ["cat"], "boxes": [[0.5, 0.5, 0.1, 0.1]]}, r"labels\[1\] cannot be read as tensors"),
        ({"class_labels": [0], "boxes": [[0.5, 0.5], [0.1]]}, r"labels\[1\] cannot be read as tensors"),
    ],
)
def test_labels_of_another_kind_are_refused_by_the_number_of_the_image(entry, message):
    good = {"class_labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5)}
    with pytest.raises(ValueError, match=message):
        collect_targets([good, entry], 2, 5, "cpu")
