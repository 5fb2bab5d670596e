"""What a detector confuses, invents and misses, at an IoU of 0.5."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from .coco import Columns

MIN_IOU = 0.5
POOR_IOU = 0.1  # from here to MIN_IOU, a detection is taken to mean the object, in a poor box
KINDS = ("wrong class", "poor localisation", "duplicate", "background")
NUM_MISTAKES = 4  # of each kind, on the page


class Mistake(NamedTuple):
    """A false positive, or an object that was missed."""

    kind: str  # one of KINDS, or "miss"
    image_id: int
    category_id: int
    box: tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels
    score: float | None  # None: of a miss
    truth: int | None  # row of the object that it is about, in the columns of the ground truth


class _Image(NamedTuple):
    image_id: int
    found: np.ndarray  # rows of the detections, highest score first
    true: np.ndarray  # rows of the ground truth
    overlaps: np.ndarray  # (N, T) IoU; with a crowd, the share of the detection that lies in it


def confusion_matrix(truth: Columns, detections: Columns, category_ids: list[int], threshold: float) -> np.ndarray:
    """How often each class was taken for which.

    Detections with a score above the threshold and objects of an image are paired whatever their classes, one to one, where
    they overlap with an IoU of 0.5 or more: the pair with the highest IoU first, of equal ones that of the same class, then the
    one with the higher score. A detection without an object that lies, by half or more, in a crowd is left out.

    Returns:
        (K + 1, K + 1) counts; rows are the annotated classes, columns the predicted ones, in the order of `category_ids`; the last
        row is the background that was taken for objects, the last column the objects that were missed.
    """
    index = {category_id: number for number, category_id in enumerate(category_ids)}
    counts = np.zeros((len(index) + 1, len(index) + 1), dtype=np.int64)
    for image in _images(truth, detections, threshold):
        found = np.array([index[label] for label in detections["labels"][image.found]], dtype=np.int64)
        true = np.array([index[label] for label in truth["labels"][image.true]], dtype=np.int64)
        is_crowd = truth["iscrowd"][image.true].astype(bool)
        pair_of = np.full(len(found), -1)
        is_free = ~is_crowd
        pairs = np.argwhere((image.overlaps >= MIN_IOU) & is_free)
        order = np.lexsort((found[pairs[:, 0]] != true[pairs[:, 1]], -image.overlaps[tuple(pairs.T)]))
        for row, column in pairs[order].tolist():
            if pair_of[row] < 0 and is_free[column]:
                pair_of[row] = column
                is_free[column] = False
        in_crowd = (image.overlaps[:, is_crowd] >= MIN_IOU).any(axis=1)
        np.add.at(counts, (true[pair_of[pair_of >= 0]], found[pair_of >= 0]), 1)
        np.add.at(counts, (-1, found[(pair_of < 0) & ~in_crowd]), 1)
        np.add.at(counts, (true[is_free], -1), 1)
    return counts


def find_mistakes(truth: Columns, detections: Columns, threshold: float, limit: int) -> list[Mistake]:
    """Of the detections with a score above the threshold: the false positives with the highest scores, of each kind, and the
    largest objects that were missed; at most one of a kind in an image.

    Right is what pycocotools calls right: of each class, highest score first, the object with the highest IoU that is free. A
    false positive is, in this order, a *duplicate* of an object of its class that a higher score has, or in a *wrong class* (both
    from an IoU of 0.5), or a *poor localisation* (0.1 to 0.5 with an object of its class), or *background*. Crowds are never
    missed, and forgive detections of their class.

    Args:
        limit: how many of each kind.
    """
    mistakes: dict[str, list[tuple[float, Mistake]]] = {kind: [] for kind in (*KINDS, "miss")}
    for image in _images(truth, detections, threshold):
        of_image: dict[str, tuple[float, Mistake]] = {}
        for rank, mistake in _mistakes_of(image, truth, detections):
            if mistake.kind not in of_image or rank > of_image[mistake.kind][0]:
                of_image[mistake.kind] = rank, mistake
        for kind, entry in of_image.items():
            mistakes[kind].append(entry)
    return [
        mistake
        for entries in mistakes.values()
        for _, mistake in sorted(entries, key=lambda entry: (-entry[0], entry[1].image_id))[:limit]
    ]


def _mistakes_of(image: _Image, truth: Columns, detections: Columns) -> Iterator[tuple[float, Mistake]]:
    """With what they are ranked by: the score of a false positive, the area of a miss."""
    true_labels, is_crowd = truth["labels"][image.true], truth["iscrowd"][image.true].astype(bool)
    taken = np.zeros(len(image.true), dtype=bool)
    for row, overlaps in zip(image.found, image.overlaps, strict=True):
        label, score = detections["labels"][row], float(detections["scores"][row])
        same = (true_labels == label) & ~is_crowd
        free = np.flatnonzero(same & ~taken & (overlaps >= MIN_IOU))
        if free.size:
            taken[free[overlaps[free].argmax()]] = True
            continue
        if (overlaps[is_crowd & (true_labels == label)] >= MIN_IOU).any():
            continue
        other = (true_labels != label) & ~is_crowd
        kind, column = "background", None
        for name, objects, lowest in zip(
            ("duplicate", "wrong class", "poor localisation"),
            (same, other, same),
            (MIN_IOU, MIN_IOU, POOR_IOU),
            strict=True,
        ):
            candidates = np.flatnonzero(objects & (overlaps >= lowest))
            if candidates.size:
                kind, column = name, int(image.true[candidates[overlaps[candidates].argmax()]])
                break
        box = tuple(detections["boxes"][row].tolist())
        yield score, Mistake(kind, image.image_id, int(label), box, score, column)
    for column in np.flatnonzero(~taken & ~is_crowd):
        row = int(image.true[column])
        x, y, width, height = truth["boxes"][row].tolist()
        box = (x, y, x + width, y + height)
        yield float(truth["area"][row]), Mistake("miss", image.image_id, int(truth["labels"][row]), box, None, row)


def _images(truth: Columns, detections: Columns, threshold: float) -> Iterator[_Image]:
    """Images that have objects or detections with a score above the threshold."""
    kept = np.flatnonzero(detections["scores"] > threshold)
    kept = kept[np.lexsort((-detections["scores"][kept], detections["image_id"][kept]))]
    found_ids = detections["image_id"][kept]
    objects = np.argsort(truth["image_id"], kind="stable")
    true_ids = truth["image_id"][objects]
    for image_id in np.union1d(found_ids, true_ids).tolist():
        found = kept[slice(*np.searchsorted(found_ids, [image_id, image_id + 1]))]
        true = objects[slice(*np.searchsorted(true_ids, [image_id, image_id + 1]))]
        yield _Image(image_id, found, true, _overlaps(truth, detections, found, true))


def _overlaps(truth: Columns, detections: Columns, found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(N, T)"""
    if not len(found) or not len(true):
        return np.zeros((len(found), len(true)))
    corners = detections["boxes"][found]
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return np.asarray(mask.iou(boxes, truth["boxes"][true], truth["iscrowd"][true].astype(np.uint8).tolist()))
