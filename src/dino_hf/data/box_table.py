"""The boxes of a split as arrays: what is asked of a million boxes is asked of all at once."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .raw import RawSplit
from .rows import MOST_PIXELS

_SLACK = 0.02  # share of a side by which hand-drawn boxes may leave their image and still count as inside
_MIN_LEAVING = (
    3  # boxes, and a share of all, that must leave their images before another reading of the numbers is tried
)
_MIN_LEAVING_SHARE = 0.1
_MAX_MISREAD_SHARE = 0.005  # of the boxes may leave under the right reading: mistakes of single boxes
_TOO_LARGE = 1e100  # for a number: products of smaller ones are finite
_SURE_BOXES = 10  # that a box of (x, y, width, height) also reads as corners inside the image is about one in four


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


def _from_xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _from_cxcywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _from_xyxy(boxes: np.ndarray) -> np.ndarray:
    return boxes


_CORNERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "xywh": _from_xywh,
    "xyxy": _from_xyxy,
    "cxcywh": _from_cxcywh,
}
LAYOUT_TEXTS = {"xywh": "(x, y, width, height)", "xyxy": "two corners", "cxcywh": "centre, width and height"}


class Reading(NamedTuple):
    """What the four numbers of boxes are, as far as the images tell."""

    layout: str  # "xywh", "xyxy" or "cxcywh"
    is_relative: bool  # to the image, instead of pixels
    is_as_read: bool  # as the files' format says
    is_sure: bool
    num_boxes: int  # that were looked at
    num_leaving: dict[str, int]  # layout -> boxes that leave their image or have no size if read like that

    def to_xywh(self, table: BoxTable, raw_format: str) -> np.ndarray:
        """(N, 4) x, y, width, height in pixels of what the files mean."""
        if self.is_as_read:
            return table.boxes
        corners = _CORNERS[self.layout](_as_written(table, raw_format))
        if self.is_relative:
            corners = corners * np.tile(table.sizes, 2)
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _as_written(table: BoxTable, raw_format: str) -> np.ndarray:
    """(N, 4) the numbers of the files, which YOLO's reader has made pixels."""
    if raw_format != "yolo":
        return table.boxes
    corners = table.corners
    centres = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, table.boxes[:, 2:]], axis=1)
    return centres / np.tile(table.sizes, 2)


def guess_reading(tables: Sequence[BoxTable], raw_format: str) -> Reading:
    """Whether the boxes are what the format says, decided over all of them: as the format says many leave their images, while
    read in another way all fit.

    Args:
        raw_format: "yolo" means centre and size relative to the image; all others (x, y, width, height) in pixels.
    """
    numbers, sizes = [], []
    for table in tables:
        looked_at = table.is_number & ~np.isnan(table.sizes).any(1)
        numbers.append(_as_written(table, raw_format)[looked_at])
        sizes.append(table.sizes[looked_at])
    numbers, sizes = np.concatenate(numbers), np.concatenate(sizes)
    expected, expects_relative = ("cxcywh", True) if raw_format == "yolo" else ("xywh", False)
    count = len(numbers)
    if not count:
        return _reading_without_sizes(tables, expected, expects_relative)
    is_relative = (np.abs(numbers).max(1) <= 1.5).mean() >= 1 - _MAX_MISREAD_SHARE
    unit = np.ones_like(sizes) if is_relative else sizes
    num_leaving = {name: int(leaving(to_corners(numbers), unit).sum()) for name, to_corners in _CORNERS.items()}

    def reading(layout: str, is_sure: bool) -> Reading:
        as_read = layout == expected and is_relative == expects_relative
        return Reading(layout, bool(is_relative), as_read, is_sure, count, num_leaving)

    others = sorted((count, name) for name, count in num_leaving.items() if name != expected)
    (best_leaving, best), (second_leaving, _) = others
    is_clear = second_leaving >= max(1, 2 * best_leaving) or best == "xyxy"
    share = num_leaving[expected] / count
    if is_relative != expects_relative:
        # Nothing can be as the format says: the layout that leaves least, the expected one where all leave alike.
        fits = sorted((count, name != expected, name) for name, count in num_leaving.items())
        is_sure = fits[0][0] <= _MAX_MISREAD_SHARE * count and fits[1][0] > fits[0][0] and count >= _SURE_BOXES
        return reading(fits[0][2], is_sure)
    # Centres that are read as corners, or the reverse, leave at two sides that meet. Things that are cut off leave at one or at
    # opposite sides, where the camera sees them come and go.
    leaving_axes = _leaving_axes(_CORNERS[expected](numbers), unit).sum(0)  # (2,)
    if best != "xyxy" and leaving_axes.min() < _MIN_LEAVING:
        return reading(expected, True)
    if (
        num_leaving[expected] >= _MIN_LEAVING
        and share >= _MIN_LEAVING_SHARE
        and best_leaving <= _MAX_MISREAD_SHARE * count
    ):
        return reading(best, is_clear and count >= _SURE_BOXES)
    return reading(expected, True)


def _reading_without_sizes(tables: Sequence[BoxTable], expected: str, expects_relative: bool) -> Reading:
    """Only boxes that all lie within one pixel tell that they are not in pixels."""
    corners = np.concatenate([table.corners[table.is_number] for table in tables])
    is_relative = expects_relative or (len(corners) > 0 and bool((corners <= 1).all()))
    return Reading(expected, is_relative, is_relative == expects_relative, True, len(corners), {})


def leaving(corners: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(N,) boxes that leave an image of (width, height) `unit` by more than a little, or have no size.

    Args:
        corners: (N, 4) x0, y0, x1, y1.
        unit: (N, 2)
    """
    return (_leaving_axes(corners, unit) | (corners[:, 2:] <= corners[:, :2])).any(1)


def _leaving_axes(corners: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(N, 2) whether they leave it at the left or right, and at the top or bottom."""
    slack = np.maximum(_SLACK * unit, np.where(unit > 1, 2, 0))  # two pixels: rounding, and borders counted from 1
    return (corners[:, :2] < -slack) | (corners[:, 2:] > unit + slack)
