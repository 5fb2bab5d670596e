"""Correct boxes: move them onto the upright image, make their sizes positive, and clip them to the image."""

from typing import NamedTuple

import numpy as np

from ..data.rows import MOST_PIXELS, SMALLEST_SIDE


class ImageGeometry(NamedTuple):
    """The change from the image on which boxes were drawn to the image as it is. One row for each image, or for each box."""

    sizes: np.ndarray  # (I, 2) width and height, upright
    stored_sizes: np.ndarray  # (I, 2) before the EXIF orientation turns it
    orientations: np.ndarray  # (I,) EXIF orientation if boxes must be turned with the image, else 1
    scales: np.ndarray  # (I, 2) factors for the boxes

    def of_boxes(self, image: np.ndarray) -> "ImageGeometry":
        """One row for each box, from the (N,) places of their images. Rows of place -1 are undefined."""
        return ImageGeometry(*(values[image] for values in self))


class CleanedBoxes(NamedTuple):
    boxes: np.ndarray  # (N, 4) x, y, width, height
    areas: np.ndarray  # (N,)
    kinds: np.ndarray  # (N,) kind of finding that was corrected or excludes the box; "" if there is none
    is_kept: np.ndarray  # (N,)


def clean_boxes(boxes: np.ndarray, areas: np.ndarray, geometry: ImageGeometry) -> CleanedBoxes:
    """Turn and scale boxes with their images, make negative sizes positive, clip to the image, and exclude boxes without size.

    Args:
        boxes: (N, 4) x, y, width, height in pixels; NaN where the data have no number.
        areas: (N,) NaN where the data have none.
        geometry: one row for each box.
    """
    kinds = np.full(len(boxes), "", dtype=object)
    with np.errstate(invalid="ignore"):
        boxes = turn_boxes(boxes * np.tile(geometry.scales, 2), geometry.orientations, geometry.stored_sizes)
        areas = areas * geometry.scales.prod(1)
        is_negative = (boxes[:, 2:] < 0).any(1)
        first = np.minimum(boxes[:, :2], boxes[:, :2] + boxes[:, 2:])
        flipped = np.concatenate([first, np.abs(boxes[:, 2:])], axis=1)
        boxes = np.where(is_negative[:, None], flipped, boxes)  # the others are not even rounded
        is_no_area = (areas < 0) | (areas >= MOST_PIXELS**2)
        is_area_wrong = ~np.isnan(areas) & ((areas <= 0) | (areas > 1.01 * boxes[:, 2:].prod(1) + 1))
        has_size = boxes[:, 2:].min(1) >= SMALLEST_SIDE
        low = np.clip(boxes[:, :2], 0, geometry.sizes)
        high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, geometry.sizes)
        visible = (high - low).min(1)
        is_clipped = ((low > boxes[:, :2]) | (high < boxes[:, :2] + boxes[:, 2:])).any(1)
    is_number = ~np.isnan(boxes).any(1)
    kinds[is_negative] = "box-negative"
    kinds[is_area_wrong & (kinds == "")] = "area-wrong"
    kinds[is_no_area & (kinds == "area-wrong")] = "area-not-number"
    kinds[is_clipped & (kinds != "box-negative")] = "box-sticks-out"
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
    swaps = orientations >= 5  # after the flips
    x0, x1 = np.where(flips_x, (width - x1, width - x0), (x0, x1))
    y0, y1 = np.where(flips_y, (height - y1, height - y0), (y0, y1))
    turned = np.where(swaps, (y0, x0, y1, x1), (x0, y0, x1, y1)).T
    turned = np.concatenate([turned[:, :2], turned[:, 2:] - turned[:, :2]], axis=1)
    return np.where((orientations == 1)[:, None], boxes, turned)
