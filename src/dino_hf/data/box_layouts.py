"""Check the layout and unit of boxes: do they fit their images as the format says, or in another layout?"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .raw import BoxTable, RawDataset, fill_sizes, make_box_table

_SLACK = 0.02  # a box may leave its image by this share of the side and still counts as inside, because boxes are drawn by hand
# At least this many boxes, and this share of all, must leave their images before another layout is tried.
_MIN_LEAVING = 3
_MIN_LEAVING_SHARE = 0.1
_MAX_MISREAD_SHARE = 0.005  # share of boxes that may leave in the right layout, because of mistakes in single boxes
_SURE_BOXES = 10  # a random (x, y, width, height) box is also valid as corners with a probability of about 1/4
# Boxes must leave by this share of a side before x and y are swapped. Boxes drawn over the border leave by less.
_FAR = 0.1

_PERCENT = 100
# Boxes in percent look like boxes in pixels that all lie in the first 100 x 100 pixels. Boxes are read as percent only if
# they fill this square, and the square is a small part of the images. Then they do not all lie there by chance.
_PERCENT_LOW, _PERCENT_HIGH = 20, 75  # the lowest corner must be below, and the highest above
# Pixels. Boxes are off centre if the margin behind them is at least twice the margin before them, plus this number.
_PERCENT_MARGIN = 10
_PERCENT_SPREAD = 5.0  # least mean of the standard deviations of both corners; a logo is always at about the same place
_PERCENT_ODDS = 1000.0  # lowest odds against the case that all boxes lie in the square by chance
_MOST_OF_IMAGE = 3  # boxes of an image that count for these odds, because boxes of an image often lie together


def _from_xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _from_cxcywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _from_xyxy(boxes: np.ndarray) -> np.ndarray:
    return boxes


def _swap(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, [1, 0, 3, 2]]


Layouts = dict[str, Callable[[np.ndarray], np.ndarray]]  # layout -> function from (N, 4) to corners x0, y0, x1, y1
_USUAL: Layouts = {"xywh": _from_xywh, "xyxy": _from_xyxy, "cxcywh": _from_cxcywh}
# Swapped layouts can be detected only in pixels: a relative box also fits with x and y swapped.
SWAPPED: Layouts = {"yxyx": _swap, "yxhw": lambda boxes: _from_xywh(_swap(boxes))}
_CORNERS = _USUAL | SWAPPED
LAYOUT_TEXTS = {
    "xywh": "(x, y, width, height)",
    "xyxy": "two corners",
    "cxcywh": "centre, width and height",
    "yxyx": "two corners with y before x, (y0, x0, y1, x1)",
    "yxhw": "(y, x, height, width)",
}


class Reading(NamedTuple):
    """Layout and unit of boxes, inferred from the sizes of their images."""

    layout: str  # "xywh", "xyxy", "cxcywh", "yxyx" or "yxhw"
    unit: str  # "pixels"; "relative" to the image, from 0 to 1; or "percent" of it
    is_as_read: bool  # the layout and unit of the format
    is_sure: bool
    num_boxes: int  # boxes that were compared with an image
    num_leaving: dict[str, int]  # layout -> boxes that leave their image or have no size in it

    @property
    def is_relative(self) -> bool:
        """Whether boxes are relative to the image instead of in pixels."""
        return self.unit != "pixels"

    @property
    def text(self) -> str:
        """Layout and unit, for messages."""
        units = {"pixels": "", "relative": " relative to the image", "percent": " in percent of the image"}
        return LAYOUT_TEXTS[self.layout] + units[self.unit]

    @property
    def box_format(self) -> str | None:
        """This layout and unit as the option `box_format` of `read_raw`. None: the option does not have it."""
        if self.layout in SWAPPED or self.unit == "percent":
            return None
        return f"{self.layout}{'n' if self.is_relative else ''}"

    def to_xywh(self, table: BoxTable, raw_format: str) -> np.ndarray:
        """(N, 4) boxes as x, y, width, height in pixels."""
        if self.is_as_read:
            return table.boxes
        corners = _CORNERS[self.layout](_as_written(table, raw_format))
        if self.is_relative:
            corners = corners * np.tile(table.sizes, 2) / (_PERCENT if self.unit == "percent" else 1)
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _as_written(table: BoxTable, raw_format: str) -> np.ndarray:
    """(N, 4) numbers as in the files. YOLO's reader has converted them to pixels, so they are converted back."""
    if raw_format != "yolo":
        return table.boxes
    corners = table.corners
    centres = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, table.boxes[:, 2:]], axis=1)
    return centres / np.tile(table.sizes, 2)


def guess_reading(tables: Sequence[BoxTable], raw_format: str) -> Reading:
    """Infer layout and unit from all boxes together. They differ from the format if many boxes leave their images in its layout,
    and all fit in another one.

    Args:
        raw_format: "yolo" means centre and size relative to the image; all others mean (x, y, width, height) in pixels.
    """
    numbers, sizes, images = [], [], []
    for table in tables:
        looked_at = table.is_number & ~np.isnan(table.sizes).any(1)
        numbers.append(_as_written(table, raw_format)[looked_at])
        sizes.append(table.sizes[looked_at])
        images.append(np.stack([np.full(looked_at.sum(), len(images)), table.image[looked_at]], axis=1))
    numbers, sizes, images = np.concatenate(numbers), np.concatenate(sizes), np.concatenate(images)
    expected, expected_unit = ("cxcywh", "relative") if raw_format == "yolo" else ("xywh", "pixels")
    count = len(numbers)
    if not count:
        return _reading_without_sizes(tables, expected, expected_unit)
    unit, side = "pixels", sizes
    if (np.abs(numbers).max(1) <= 1.5).mean() >= 1 - _MAX_MISREAD_SHARE:
        unit, side = "relative", np.ones_like(sizes)
    elif _are_percent(numbers, sizes, images, expected):
        unit, side = "percent", np.full_like(sizes, _PERCENT)
    layouts = _CORNERS if unit == "pixels" else _USUAL
    num_leaving = {name: int(leaving(to_corners(numbers), side).sum()) for name, to_corners in layouts.items()}

    def reading(layout: str, is_sure: bool) -> Reading:
        is_as_read = layout == expected and unit == expected_unit
        named = {  # swapped layouts are listed only if they fit as well
            name: leaves
            for name, leaves in num_leaving.items()
            if name in _USUAL or (not is_as_read and leaves <= num_leaving[layout])
        }
        return Reading(layout, unit, is_as_read, is_sure, count, named)

    if unit != expected_unit:
        # The layout in which fewest boxes leave; the expected one if all are equal.
        fits = sorted((num_leaving[name], name != expected, name) for name in _USUAL)
        is_sure = fits[0][0] <= _MAX_MISREAD_SHARE * count and fits[1][0] > fits[0][0] and count >= _SURE_BOXES
        return reading(fits[0][2], is_sure)
    others = sorted((num_leaving[name], name) for name in _USUAL if name != expected)
    (best_leaving, best), (second_leaving, _) = others
    if _is_other(numbers, side, num_leaving[expected], best, best_leaving, expected):
        is_clear = second_leaving >= max(1, 2 * best_leaving) or best == "xyxy"
        return reading(best, is_clear and count >= _SURE_BOXES)
    if unit == "pixels" and (fitting := _swapped_layouts(numbers, side, num_leaving, expected)):
        # Sizes of large boxes often read as corners too, but corners seldom as sizes.
        layout = "yxhw" if "yxhw" in fitting else "yxyx"
        return reading(layout, len(fitting) == 1 and count >= _SURE_BOXES)
    return reading(expected, True)


def _is_other(
    numbers: np.ndarray, side: np.ndarray, expected_leaving: int, best: str, best_leaving: int, expected: str
) -> bool:
    """Whether many boxes leave their images in the expected layout, and all fit in the layout `best`."""
    # Centres read as corners, or the reverse, leave the image in x and in y. Objects that are cut off leave it in only one of
    # them.
    leaving_axes = _leaving_axes(_CORNERS[expected](numbers), side).sum(0)  # (2,)
    if best != "xyxy" and leaving_axes.min() < _MIN_LEAVING:
        return False
    return (
        expected_leaving >= _MIN_LEAVING
        and expected_leaving >= _MIN_LEAVING_SHARE * len(numbers)
        and best_leaving <= _MAX_MISREAD_SHARE * len(numbers)
    )


def _swapped_layouts(numbers: np.ndarray, sizes: np.ndarray, num_leaving: dict[str, int], expected: str) -> list[str]:
    """Layouts with y before x that fit. Empty if the sizes of the images do not show it.

    Many boxes must leave their images by far in the expected layout, and nearly all must fit only in swapped layouts.
    """
    fitting = [name for name, count in num_leaving.items() if count <= _MAX_MISREAD_SHARE * len(numbers)]
    if not fitting or not set(fitting) <= set(SWAPPED):
        return []
    num_far = leaving(_CORNERS[expected](numbers), sizes, _FAR).sum()
    if num_far < _MIN_LEAVING or num_far < _MIN_LEAVING_SHARE * len(numbers):
        return []
    return fitting


def _are_percent(numbers: np.ndarray, sizes: np.ndarray, images: np.ndarray, expected: str) -> bool:
    """Whether boxes are in percent of their image.

    Args:
        numbers: (N, 4) as in the files.
        sizes: (N, 2) width and height of the image of each box.
        images: (N, 2) numbers of the split and the image of each box.
    """
    square = np.full_like(sizes, _PERCENT)
    fits = [
        (int(leaving(to_corners(numbers), square).sum()), name != expected, name) for name, to_corners in _USUAL.items()
    ]
    num_leaving, _, layout = min(fits)
    if num_leaving > _MAX_MISREAD_SHARE * len(numbers):
        return False
    corners = _USUAL[layout](numbers)
    corners = corners[~leaving(corners, square)]
    low, high = corners[:, :2].min(0), corners[:, 2:].max(0)  # (2,) each, x and y
    fills = (low <= _PERCENT_LOW) & (high >= _PERCENT_HIGH)
    is_off_centre = np.median(sizes, axis=0) - high >= 2 * low + _PERCENT_MARGIN
    is_spread = corners.std(0).reshape(2, 2).mean(0) >= _PERCENT_SPREAD
    if not (fills & is_off_centre & is_spread).all():
        return False
    _, first, counts = np.unique(images, axis=0, return_index=True, return_counts=True)
    odds = np.log(sizes[first] / _PERCENT).sum(1)  # (images,)
    return bool((np.minimum(counts, _MOST_OF_IMAGE) * odds).sum() >= math.log(_PERCENT_ODDS))


def _reading_without_sizes(tables: Sequence[BoxTable], expected: str, expected_unit: str) -> Reading:
    """The reading if no size is known. Boxes that all lie within one pixel are relative."""
    corners = np.concatenate([table.corners[table.is_number] for table in tables])
    is_relative = expected_unit == "relative" or (len(corners) > 0 and bool((corners <= 1).all()))
    unit = "relative" if is_relative else "pixels"
    return Reading(expected, unit, unit == expected_unit, True, len(corners), {})


def leaving(corners: np.ndarray, side: np.ndarray, slack: float = _SLACK) -> np.ndarray:
    """(N,) whether a box leaves its image by more than a small slack, or has no size.

    Args:
        corners: (N, 4) x0, y0, x1, y1.
        side: (N, 2) width and height of the image.
        slack: a box may leave by this share of a side.
    """
    return (_leaving_axes(corners, side, slack) | (corners[:, 2:] <= corners[:, :2])).any(1)


def _leaving_axes(corners: np.ndarray, side: np.ndarray, slack: float = _SLACK) -> np.ndarray:
    """(N, 2) whether a box leaves its image in x, and in y."""
    room = np.maximum(
        slack * side, np.where(side > 1, 2, 0)
    )  # at least two pixels, for rounding and for tools that count from 1
    return (corners[:, :2] < -room) | (corners[:, 2:] > side + room)


def guess_readings(
    raw: RawDataset, tables: dict[str, BoxTable], sizes_are_from_files: bool = False
) -> dict[str, Reading]:
    """Infer the layout of each split. If another layout fits the whole data set better, all splits get it.

    Args:
        tables: boxes of each split.
        sizes_are_from_files: the sizes in the tables were read from the image files, not only stated.
    """
    readings = _guess(tables, raw.format)
    if sizes_are_from_files or not any(reading.layout in SWAPPED for reading in readings.values()):
        return readings
    # If the stated width and height are swapped, correct boxes look swapped. Therefore the sizes are read from the image files.
    splits = {name: fill_sizes(split, replace_stated=True) for name, split in raw.splits.items()}
    return _guess({name: make_box_table(split, raw.categories) for name, split in splits.items()}, raw.format)


def _guess(tables: dict[str, BoxTable], raw_format: str) -> dict[str, Reading]:
    if not tables:
        return {}
    of_all = guess_reading(list(tables.values()), raw_format)
    if not of_all.is_as_read:
        return dict.fromkeys(tables, of_all)
    return {name: guess_reading([table], raw_format) for name, table in tables.items()}


def check_reading(raw: RawDataset) -> None:
    """Check that the boxes of all splits have the layout of their format.

    Raises:
        ValueError: many boxes leave their images, and all fit in another layout.
    """
    tables = {name: make_box_table(split, raw.categories) for name, split in raw.splits.items()}
    for name, reading in guess_readings(raw, tables).items():
        if reading.is_as_read:
            continue
        raise ValueError(f"{raw.splits[name].origin}: {_what_is_wrong(reading, raw.format)}")


def _what_is_wrong(reading: Reading, raw_format: str) -> str:
    is_yolo = raw_format == "yolo"
    expected = "cxcywh" if is_yolo else "xywh"
    units = {
        "relative": "relative to the image",
        "pixels": "in pixels",
        "percent": "in percent of the image (0 to 100)",
    }
    num_leaving = reading.num_leaving
    if reading.unit != ("relative" if is_yolo else "pixels"):
        expected_unit = "relative to the image (0 to 1)" if is_yolo else "in pixels"
        text = f"the boxes are {units[reading.unit]}, while {raw_format} data have them {expected_unit}"
        factor = "100" if reading.unit == "percent" else "width and height"
        cure = f"divide them by {factor}" if is_yolo else f"multiply them by {_PER_PIXEL[reading.unit]}"
        if reading.unit == "percent" and reading.layout != expected:
            cure += f", and convert them from {LAYOUT_TEXTS[reading.layout]} to {LAYOUT_TEXTS[expected]}"
    else:
        text = (
            f"{num_leaving[expected]} of {reading.num_boxes} boxes leave their images as {LAYOUT_TEXTS[expected]}, which "
            f"{raw_format} data have; as {LAYOUT_TEXTS[reading.layout]}, {num_leaving[reading.layout]} do"
        )
        cure = f"convert them to {LAYOUT_TEXTS[expected]}"
    if raw_format == "huggingface" and (box_format := reading.box_format):
        cure += f', or name their format with box_format="{box_format}" (--box-format {box_format})'
    return f"{text}: {cure}. If the boxes are right as they are, set trust_boxes=True (--trust-boxes)."


_PER_PIXEL = {"relative": "width and height", "percent": "width / 100 and height / 100"}
