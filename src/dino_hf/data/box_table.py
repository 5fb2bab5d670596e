"""The boxes of a split as arrays: what is asked of a million boxes is asked of all at once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .raw import RawSplit
from .rows import MOST_PIXELS

_TOO_LARGE = 1e100  # for a number: products of smaller ones are finite


class BoxTable(NamedTuple):
    """Annotations of a split in their order; N of them."""

    boxes: (
        np.ndarray
    )  # (N, 4) float64 as in the files; not a number where they are not four numbers that training takes
    image: np.ndarray  # (N,) place of the image in split.images; -1 if there is none of that id
    category: np.ndarray  # (N,) place in the categories; -1 if there is none of that id
    is_crowd: np.ndarray  # (N,) bool
    area: np.ndarray  # (N,) as in the files; not a number where they have none
    sizes: np.ndarray  # (N, 2) width and height of the image as stated; not a number where unknown

    @property
    def is_number(self) -> np.ndarray:
        """(N,)"""
        return np.isfinite(self.boxes).all(1)

    @property
    def corners(self) -> np.ndarray:
        """(N, 4) x0, y0, x1, y1, if the files mean (x, y, width, height) in pixels."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)


def make_box_table(split: RawSplit, categories: Sequence[dict], image_sizes: np.ndarray | None = None) -> BoxTable:
    """Whatever an annotation lacks or has of a wrong type becomes "not a number" or "none of that id".

    Args:
        image_sizes: (I, 2) width and height that the boxes are for; as stated in the files if not given.
    """
    annotations = split.annotations
    image = _places([entry.get("image_id") for entry in annotations], [entry.get("id") for entry in split.images])
    category = _places([entry.get("category_id") for entry in annotations], [entry.get("id") for entry in categories])
    if image_sizes is None:
        image_sizes = stated_sizes(split)
    sizes = np.full((len(annotations), 2), np.nan)
    sizes[image >= 0] = image_sizes[image[image >= 0]]
    return BoxTable(
        boxes=_boxes([entry.get("bbox") for entry in annotations]),
        image=image,
        category=category,
        is_crowd=np.array([bool(entry.get("iscrowd")) for entry in annotations], dtype=bool),
        area=_numbers([entry.get("area") for entry in annotations]),
        sizes=sizes,
    )


def stated_sizes(split: RawSplit) -> np.ndarray:
    """(I, 2) width and height; not a number where the data do not tell or tell nonsense."""
    sizes = [(image.get("width"), image.get("height")) for image in split.images]
    known = [size if all(_is_number(side) and side > 0 for side in size) else (math.nan, math.nan) for size in sizes]
    return np.array(known, dtype=np.float64).reshape(-1, 2)


def count_boxes(table: BoxTable, num_images: int) -> np.ndarray:
    """(I,) annotations of each image."""
    return np.bincount(table.image[table.image >= 0], minlength=num_images)


def _is_number(value) -> bool:
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        return False
    return abs(value) < _TOO_LARGE  # compares whole numbers that no float holds, and is False for NaN


def _places(ids: list, known: list) -> np.ndarray:
    """(len(ids),) where each id stands among the known ones, at its first place; -1 if nowhere."""
    place_of = {}
    for place, value in enumerate(known):
        if value is not None and isinstance(value, int | str | np.integer):
            place_of.setdefault(value, place)
    try:
        return np.fromiter((place_of.get(value, -1) for value in ids), dtype=np.int64, count=len(ids))
    except TypeError:  # a list or dictionary where an id should be
        ids = [value if isinstance(value, int | str | np.integer) else None for value in ids]
        return np.fromiter((place_of.get(value, -1) for value in ids), dtype=np.int64, count=len(ids))


def _boxes(values: list) -> np.ndarray:
    """(len(values), 4)"""
    try:
        boxes = np.array(values)  # fast, and right for data that are not broken
    except ValueError:
        boxes = None
    if boxes is None or boxes.dtype.kind not in "iuf" or boxes.shape != (len(values), 4):
        rows = [np.ravel(value).tolist() if isinstance(value, np.ndarray) else value for value in values]
        is_box = [isinstance(row, list | tuple) and len(row) == 4 and all(map(_is_number, row)) for row in rows]
        boxes = np.array([row if good else [math.nan] * 4 for row, good in zip(rows, is_box, strict=True)])
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    boxes[~(np.abs(boxes) < MOST_PIXELS).all(1)] = np.nan
    return boxes


def _numbers(values: list) -> np.ndarray:
    """(len(values),) not a number for None; -inf for what is neither a finite number nor None."""
    numbers = [math.nan if value is None else value if _is_number(value) else -math.inf for value in values]
    return np.array(numbers, dtype=np.float64)
