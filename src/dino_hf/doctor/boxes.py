"""Correct boxes, and find objects that are annotated twice."""

from typing import NamedTuple

import numpy as np

from ..data.raw import BoxTable
from ..data.rows import MOST_PIXELS, SMALLEST_SIDE


class ImageGeometry(NamedTuple):
    """How the actual images differ from the images on which boxes were drawn. One row for each image, or for each box."""

    sizes: np.ndarray  # (I, 2) width and height, upright
    stored_sizes: np.ndarray  # (I, 2) before the EXIF orientation turns it
    orientations: np.ndarray  # (I,) EXIF orientation if boxes must be turned with the image, else 1
    scales: np.ndarray  # (I, 2) factors for the boxes

    def of_boxes(self, image: np.ndarray) -> "ImageGeometry":
        """One row for each box, from the (N,) places of their images. Rows of place -1 are undefined."""
        return ImageGeometry(*(values[image] for values in self))


# Relative boxes of YOLO have six decimals. A box at the border of an image of 4,000 pixels is up to 0.003 pixels outside: it is
# clipped, but not reported.
_ROUNDING = 0.005


class CleanedBoxes(NamedTuple):
    boxes: np.ndarray  # (N, 4) x, y, width, height
    areas: np.ndarray  # (N,)
    kinds: np.ndarray  # (N,) kind of finding for which the box was corrected or left out; "" if none
    is_kept: np.ndarray  # (N,)


def clean_boxes(boxes: np.ndarray, areas: np.ndarray, geometry: ImageGeometry) -> CleanedBoxes:
    """Turn and scale boxes with their images, make negative sizes positive, clip to the image, and exclude boxes without size.

    Args:
        boxes: (N, 4) x, y, width, height in pixels; NaN where the data have no number.
        areas: (N,) NaN if the data do not state the area.
        geometry: one row for each box.
    """
    kinds = np.full(len(boxes), "", dtype=object)
    with np.errstate(invalid="ignore"):
        boxes = turn_boxes(boxes * np.tile(geometry.scales, 2), geometry.orientations, geometry.stored_sizes)
        areas = areas * geometry.scales.prod(1)
        is_negative = (boxes[:, 2:] < 0).any(1)
        first = np.minimum(boxes[:, :2], boxes[:, :2] + boxes[:, 2:])
        flipped = np.concatenate([first, np.abs(boxes[:, 2:])], axis=1)
        boxes = np.where(is_negative[:, None], flipped, boxes)  # other boxes keep their exact values
        is_no_area = (areas < 0) | (areas >= MOST_PIXELS**2)
        is_area_wrong = ~np.isnan(areas) & ((areas <= 0) | (areas > 1.01 * boxes[:, 2:].prod(1) + 1))
        has_size = boxes[:, 2:].min(1) >= SMALLEST_SIDE
        low = np.clip(boxes[:, :2], 0, geometry.sizes)
        high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, geometry.sizes)
        visible = (high - low).min(1)
        excess = np.maximum(low - boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - high).max(1)
        is_clipped, is_reported = excess > 0, excess > _ROUNDING
    is_number = ~np.isnan(boxes).any(1)
    kinds[is_negative] = "box-negative"
    kinds[is_area_wrong & (kinds == "")] = "area-wrong"
    kinds[is_no_area & (kinds == "area-wrong")] = "area-not-number"
    kinds[is_reported & (kinds != "box-negative")] = "box-sticks-out"
    is_kept = is_number & has_size & (visible >= SMALLEST_SIDE)
    kinds[~is_kept] = np.where(has_size & (visible <= 0), "box-outside", "box-empty")[~is_kept]
    kinds[~is_number] = "box-not-numbers"
    boxes = np.where(is_clipped[:, None], np.concatenate([low, high - low], axis=1), boxes)
    box_areas = boxes[:, 2:].prod(1)
    areas = np.where(np.isnan(areas) | is_area_wrong, box_areas, np.minimum(areas, box_areas))
    return CleanedBoxes(boxes, areas, kinds, is_kept)


def turn_boxes(boxes: np.ndarray, orientations: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Turn boxes from the stored image to the image turned by its EXIF orientation.

    Args:
        boxes: (N, 4) x, y, width, height.
        orientations: (N,) 1 to 8.
        sizes: (N, 2) width and height as stored.
    """
    (x0, y0), (x1, y1) = boxes[:, :2].T, (boxes[:, :2] + boxes[:, 2:]).T
    width, height = sizes.T
    flips_x, flips_y = np.isin(orientations, (2, 3, 7, 8)), np.isin(orientations, (3, 4, 6, 7))
    swaps = orientations >= 5  # x and y are swapped after the flips
    x0, x1 = np.where(flips_x, (width - x1, width - x0), (x0, x1))
    y0, y1 = np.where(flips_y, (height - y1, height - y0), (y0, y1))
    turned = np.where(swaps, (y0, x0, y1, x1), (x0, y0, x1, y1)).T
    turned = np.concatenate([turned[:, :2], turned[:, 2:] - turned[:, :2]], axis=1)
    return np.where((orientations == 1)[:, None], boxes, turned)


# Intersection over union from which two boxes of a class mean the same object. In photographs of blood cells with 4,888 boxes,
# eight cells are annotated twice, with 0.83 to 0.93. Boxes of different cells often overlap and stay below 0.6.
NEAR_IOU = 0.8
# A million boxes of usual data need about as many comparisons. Hundreds of thousands of boxes in one image would need more.
_MOST_COMPARISONS = 5_000_000


def repeated_boxes(table: BoxTable) -> tuple[np.ndarray, np.ndarray]:
    """(N,), (N,) whether a box repeats an earlier box of its image and class, and whether it repeats a box of another class."""
    same_class, other_class = np.zeros((2, len(table.boxes)), dtype=bool)
    compared = np.flatnonzero(table.is_number & (table.image >= 0) & ~table.is_crowd)
    keys = np.column_stack([table.image[compared], table.boxes[compared], table.category[compared]])  # (M, 6)
    order = np.lexsort(keys.T[::-1])  # stable: the first of equal boxes stays first
    is_same = keys[order][1:] == keys[order][:-1]  # (M - 1, 6)
    same_box = is_same[:, :5].all(1)
    repeating = compared[order][1:]
    same_class[repeating[same_box & is_same[:, 5]]] = True
    other_class[repeating[same_box & ~is_same[:, 5]]] = True
    return same_class, other_class


def near_repeats(table: BoxTable) -> np.ndarray:
    """(P, 2) places of an earlier and a later box of the same image and class that are almost equal, but not equal.

    Boxes are in pixels. Pairs are in the order of the later box. The time is bounded, so not all pairs are found in images with
    many thousand boxes.
    """
    with np.errstate(invalid="ignore"):
        is_compared = table.is_number & (table.image >= 0) & ~table.is_crowd & (table.boxes[:, 2:] > 0).all(1)
    is_compared &= ~repeated_boxes(table)[0]  # a separate finding
    places = np.flatnonzero(is_compared)
    boxes = table.boxes[places]
    order = np.lexsort([boxes[:, 0], table.category[places], table.image[places]])
    places, boxes = places[order], boxes[order]
    group, corners = np.column_stack([table.image[places], table.category[places]]), table.corners[places]
    # Boxes with this overlap differ by at most this much in x, because their intersection covers NEAR_IOU of their union.
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
    """(P,) intersection over union of each pair of (P, 4) corners."""
    inside = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    overlap = inside.clip(min=0).prod(1)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(1) for corners in (first, second)]
    return overlap / (areas[0] + areas[1] - overlap)


def without_near_repeats(pairs: np.ndarray, count: int) -> np.ndarray:
    """(count,) whether a box stays. A box that nearly repeats an earlier box that stays is left out.

    Args:
        pairs: result of `near_repeats`.
    """
    stays = np.ones(count, dtype=bool)
    for first, second in pairs.tolist():  # in the order of the later box, so it is known which earlier ones stay
        if stays[first]:
            stays[second] = False
    return stays
