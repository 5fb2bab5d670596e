"""Layout and unit of boxes: check by the sizes of the images that they are as the format says."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .raw import BoxTable, RawDataset, fill_sizes, make_box_table

_SLACK = 0.02  # share of a side by which hand-drawn boxes may leave their image and still count as inside
_MIN_LEAVING = (
    3  # boxes, and a share of all, that must leave their images before another reading of the numbers is tried
)
_MIN_LEAVING_SHARE = 0.1
_MAX_MISREAD_SHARE = 0.005  # of the boxes may leave under the right reading: mistakes of single boxes
_SURE_BOXES = 10  # that a box of (x, y, width, height) also reads as corners inside the image is about one in four
# Share of a side by which boxes must leave before y is taken for x. Boxes that were drawn over the border leave by less.
_FAR = 0.1

_PERCENT = 100
# Boxes in percent look like boxes in pixels that all lie in the first 100 x 100 pixels. Boxes in pixels are taken for percent only
# if they fill that square, and if it is so small a part of the images that chance does not put all of them there.
_PERCENT_LOW, _PERCENT_HIGH = 20, 75  # the lowest corner is below, and the highest above
_PERCENT_MARGIN = 10  # pixels by which the margin behind them is more than twice the margin before: they are off centre
_PERCENT_SPREAD = 5.0  # mean of the standard deviations of both corners; a logo is always at about the same place
_PERCENT_ODDS = 1000.0  # that boxes drawn anywhere in their images all lie in the square
_MOST_OF_IMAGE = 3  # boxes of an image that count for these odds, because boxes of one image often lie together


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
# They are told from others only in pixels: relative to its image, a box fits with x and y swapped.
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
    """What the four numbers of boxes are, as far as the images tell."""

    layout: str  # "xywh", "xyxy", "cxcywh", "yxyx" or "yxhw"
    unit: str  # "pixels"; "relative" to the image, from 0 to 1; or "percent" of it
    is_as_read: bool  # as the files' format says
    is_sure: bool
    num_boxes: int  # that were looked at
    num_leaving: dict[str, int]  # layout -> boxes that leave their image or have no size if read like that

    @property
    def is_relative(self) -> bool:
        """To the image, instead of in pixels."""
        return self.unit != "pixels"

    @property
    def text(self) -> str:
        """Layout and unit, for messages."""
        units = {"pixels": "", "relative": " relative to the image", "percent": " in percent of the image"}
        return LAYOUT_TEXTS[self.layout] + units[self.unit]

    @property
    def box_format(self) -> str | None:
        """The name of this reading as an option of `read_raw`. None: it has no such name."""
        if self.layout in SWAPPED or self.unit == "percent":
            return None
        return f"{self.layout}{'n' if self.is_relative else ''}"

    def to_xywh(self, table: BoxTable, raw_format: str) -> np.ndarray:
        """(N, 4) x, y, width, height in pixels of what the files mean."""
        if self.is_as_read:
            return table.boxes
        corners = _CORNERS[self.layout](_as_written(table, raw_format))
        if self.is_relative:
            corners = corners * np.tile(table.sizes, 2) / (_PERCENT if self.unit == "percent" else 1)
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
        named = {  # swapped layouts only where they fit as well
            name: leaves
            for name, leaves in num_leaving.items()
            if name in _USUAL or (not is_as_read and leaves <= num_leaving[layout])
        }
        return Reading(layout, unit, is_as_read, is_sure, count, named)

    if unit != expected_unit:
        # Nothing can be as the format says: the layout that leaves least, the expected one where all leave alike.
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
    """Whether many boxes leave their images as the format says, while all fit in the layout `best`."""
    # Centres that are read as corners, or the reverse, leave at two sides that meet. Things that are cut off leave at one or at
    # opposite sides, where the camera sees them come and go.
    leaving_axes = _leaving_axes(_CORNERS[expected](numbers), side).sum(0)  # (2,)
    if best != "xyxy" and leaving_axes.min() < _MIN_LEAVING:
        return False
    return (
        expected_leaving >= _MIN_LEAVING
        and expected_leaving >= _MIN_LEAVING_SHARE * len(numbers)
        and best_leaving <= _MAX_MISREAD_SHARE * len(numbers)
    )


def _swapped_layouts(numbers: np.ndarray, sizes: np.ndarray, num_leaving: dict[str, int], expected: str) -> list[str]:
    """The layouts with y before x that the boxes may have. None of them, if the images do not tell.

    Many boxes must leave their images far as the format says, and nearly all must fit in the swapped layout only.
    """
    fitting = [name for name, count in num_leaving.items() if count <= _MAX_MISREAD_SHARE * len(numbers)]
    if not fitting or not set(fitting) <= set(SWAPPED):
        return []
    num_far = leaving(_CORNERS[expected](numbers), sizes, _FAR).sum()
    if num_far < _MIN_LEAVING or num_far < _MIN_LEAVING_SHARE * len(numbers):
        return []
    return fitting


def _are_percent(numbers: np.ndarray, sizes: np.ndarray, images: np.ndarray, expected: str) -> bool:
    """
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
    """Only boxes that all lie within one pixel tell that they are not in pixels."""
    corners = np.concatenate([table.corners[table.is_number] for table in tables])
    is_relative = expected_unit == "relative" or (len(corners) > 0 and bool((corners <= 1).all()))
    unit = "relative" if is_relative else "pixels"
    return Reading(expected, unit, unit == expected_unit, True, len(corners), {})


def leaving(corners: np.ndarray, side: np.ndarray, slack: float = _SLACK) -> np.ndarray:
    """(N,) boxes that leave an image of (width, height) `side` by more than a little, or have no size.

    Args:
        corners: (N, 4) x0, y0, x1, y1.
        side: (N, 2)
        slack: share of a side by which a box may leave.
    """
    return (_leaving_axes(corners, side, slack) | (corners[:, 2:] <= corners[:, :2])).any(1)


def _leaving_axes(corners: np.ndarray, side: np.ndarray, slack: float = _SLACK) -> np.ndarray:
    """(N, 2) whether they leave it at the left or right, and at the top or bottom."""
    room = np.maximum(slack * side, np.where(side > 1, 2, 0))  # two pixels: rounding, and borders counted from 1
    return (corners[:, :2] < -room) | (corners[:, 2:] > side + room)


def guess_readings(
    raw: RawDataset, tables: dict[str, BoxTable], sizes_are_of_files: bool = False
) -> dict[str, Reading]:
    """The reading of each split. If one wrong reading explains the whole data set, all splits get it.

    Args:
        tables: the boxes of each split.
        sizes_are_of_files: the sizes in the tables are those of the image files, not only stated.
    """
    readings = _guess(tables, raw.format)
    if sizes_are_of_files or not any(reading.layout in SWAPPED for reading in readings.values()):
        return readings
    # Right boxes look swapped if the stated width and height are, so the image files decide.
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
    """
    Raises:
        ValueError: many boxes leave their images, and all fit when read in another way.
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
        wanted = "relative to the image (0 to 1)" if is_yolo else "in pixels"
        text = f"the boxes are {units[reading.unit]}, while {raw_format} data have them {wanted}"
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
    return f"{text}: {cure}. If they are right as they are, say so with trust_boxes=True (--trust-boxes)."


_PER_PIXEL = {"relative": "width and height", "percent": "width / 100 and height / 100"}
