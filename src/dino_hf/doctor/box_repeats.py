"""Boxes of one thing that is annotated twice: equal ones, and nearly equal ones."""

import numpy as np

from ..data.box_table import BoxTable

# Intersection over union from which two boxes of a class are taken for one thing. Photographs of blood cells with 4,888 boxes,
# many of which overlap, have eight cells that are annotated twice, at 0.83 to 0.93. No boxes of two cells reach 0.6.
NEAR_IOU = 0.8
_MOST_COMPARISONS = (
    5_000_000  # a million boxes of sensible data need about as many; hundreds of thousands in one image need more
)


def repeated_boxes(table: BoxTable) -> tuple[np.ndarray, np.ndarray]:
    """(N,), (N,): whether a box repeats an earlier one of its image and class, and whether it repeats one of another class."""
    same_class, other_class = np.zeros((2, len(table.boxes)), dtype=bool)
    compared = np.flatnonzero(table.is_number & (table.image >= 0) & ~table.is_crowd)
    keys = np.column_stack([table.image[compared], table.boxes[compared], table.category[compared]])  # (M, 6)
    order = np.lexsort(keys.T[::-1])  # stable: the first one of equals stays first
    is_same = keys[order][1:] == keys[order][:-1]  # (M - 1, 6)
    same_box = is_same[:, :5].all(1)
    repeating = compared[order][1:]
    same_class[repeating[same_box & is_same[:, 5]]] = True
    other_class[repeating[same_box & ~is_same[:, 5]]] = True
    return same_class, other_class


def near_repeats(table: BoxTable) -> np.ndarray:
    """(P, 2) places of an earlier and a later box of the same image and class that overlap almost wholly but are not equal.

    Boxes are in pixels. Pairs are in the order of the later box. Images of many thousand boxes may have more pairs than are found:
    the time is bounded.
    """
    with np.errstate(invalid="ignore"):
        is_compared = table.is_number & (table.image >= 0) & ~table.is_crowd & (table.boxes[:, 2:] > 0).all(1)
    is_compared &= ~repeated_boxes(table)[0]  # named by themselves
    places = np.flatnonzero(is_compared)
    boxes = table.boxes[places]
    order = np.lexsort([boxes[:, 0], table.category[places], table.image[places]])
    places, boxes = places[order], boxes[order]
    group, corners = np.column_stack([table.image[places], table.category[places]]), table.corners[places]
    # Boxes of this overlap are shifted by at most this in x: their intersection covers NEAR_IOU of both widths together.
    reach = boxes[:, 0] + (1 / NEAR_IOU - 1) * boxes[:, 2]
    active, pairs, num_compared, shift = np.arange(len(places)), [], 0, 0
    while num_compared < _MOST_COMPARISONS:
        shift += 1
        active = active[active + shift < len(places)]
        other = active + shift
        is_near = (group[active] == group[other]).all(1) & (boxes[other, 0] <= reach[active])
        active, other = active[is_near], other[is_near]
        if not len(active):
            break
        num_compared += len(active)
        found = _iou(corners[active], corners[other]) >= NEAR_IOU
        pairs.append(np.sort(np.column_stack([places[active[found]], places[other[found]]]), axis=1))
    if not pairs:
        return np.zeros((0, 2), dtype=np.int64)
    pairs = np.concatenate(pairs)
    is_equal = (table.boxes[pairs[:, 0]] == table.boxes[pairs[:, 1]]).all(1)
    pairs = pairs[~is_equal]
    return pairs[np.argsort(pairs[:, 1] * len(table.boxes) + pairs[:, 0])]


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P,) of each two of (P, 4) corners."""
    inside = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    overlap = inside.clip(min=0).prod(1)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(1) for corners in (first, second)]
    return overlap / (areas[0] + areas[1] - overlap)


def without_near_repeats(pairs: np.ndarray, count: int) -> np.ndarray:
    """(count,) whether a box stays if each box that nearly repeats an earlier one that stays is left out.

    Args:
        pairs: of `near_repeats`.
    """
    stays = np.ones(count, dtype=bool)
    for first, second in pairs.tolist():  # in the order of the later box, so it is known which earlier ones stay
        if stays[first]:
            stays[second] = False
    return stays
