"""The mistakes of a detector at an IoU of 0.5: confused classes, false positives and missed objects."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from .coco import Columns

MIN_IOU = 0.5
POOR_IOU = 0.1  # from here to MIN_IOU, a detection counts as poorly localised on the object
KINDS = ("wrong class", "poor localisation", "duplicate", "background")
NUM_MISTAKES = 4  # mistakes of each kind that are drawn


class Mistake(NamedTuple):
    """A false positive or a missed object."""

    kind: str  # one of KINDS, or "miss"
    image_id: int
    category_id: int
    box: tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels
    score: float | None  # None for a miss
    truth: int | None  # row of the object concerned, in the columns of the ground truth


class _Image(NamedTuple):
    image_id: int
    found: np.ndarray  # rows of the detections, highest score first
    true: np.ndarray  # rows of the ground truth
    overlaps: np.ndarray  # (N, T) IoU; for a crowd, the share of the detection that lies in it


def confusion_matrix(truth: Columns, detections: Columns, category_ids: list[int], threshold: float) -> np.ndarray:
    """Count how often objects of each class were detected as each class.

    In each image, objects are paired one to one with detections that have a score above the threshold. A pair has an IoU of at
    least 0.5; its classes may differ. Pairs with a higher IoU come first. For equal IoU, pairs of the same class come first,
    then pairs with a higher score. An unpaired detection is ignored if at least half of it lies in a crowd.

    Returns:
        (K + 1, K + 1) counts. Rows are annotated classes, columns predicted classes, in the order of `category_ids`. The last row
        counts detections on background, the last column missed objects.
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
    """The false positives with the highest scores, for each kind, and the largest missed objects.

    Detections with a score above the threshold are matched as in pycocotools: within a class, highest score first, with the free
    object of highest IoU. The kind of a false positive is the first that applies:

    - *duplicate*: an object of its class with an IoU of at least 0.5, which is matched with a detection of higher score
    - *wrong class*: an object of another class with an IoU of at least 0.5
    - *poor localisation*: an object of its class with an IoU of 0.1 to 0.5
    - *background*: none of these

    A crowd is never a miss, and detections of its class in it are no mistakes. An image has at most one mistake of each kind.

    Args:
        limit: number of mistakes of each kind.
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
    """Yield mistakes with their rank: the score of a false positive, the area of a missed object."""
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
    """Yield the images that have objects or detections with a score above the threshold."""
    kept = np.flatnonzero(detections["scores"] > threshold)
    kept = kept[np.lexsort((-detections["scores"][kept], detections["image_id"][kept]))]
    found_ids = detections["image_id"][kept]
    objects = np.argsort(truth["image_id"], kind="stable")
    true_ids = truth["image_id"][objects]
    for image_id in np.union1d(found_ids, true_ids).tolist():
        found = kept[slice(*np.searchsorted(found_ids, [image_id, image_id + 1]))]
        true = objects[slice(*np.searchsorted(true_ids, [image_id, image_id + 1]))]
        yield _Image(image_id, found, true, overlaps(truth, detections, found, true))


def overlaps(truth: Columns, detections: Columns, found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(N, T) IoU of all pairs of a detection and an object."""
    if not len(found) or not len(true):
        return np.zeros((len(found), len(true)))
    corners = detections["boxes"][found]
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return np.asarray(mask.iou(boxes, truth["boxes"][true], truth["iscrowd"][true].astype(np.uint8).tolist()))
