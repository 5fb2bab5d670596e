"""Images whose size differs from the stated one: decide for which of the two sizes the boxes were drawn."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data.box_layouts import leaving
from ..data.box_table import BoxTable
from ..data.image_facts import ImageFacts

_FLIPPING, _TURNING = (2, 3, 4), (5, 6, 7, 8)  # EXIF orientations that keep width and height, and that swap them
SURE = 20.0  # likelihood ratio of the two sizes from which one is chosen, if the boxes fit both


class SizeFit(NamedTuple):
    """Sizes of the images of a split."""

    kinds: list[str | None]  # kind of finding for the size of each image; None: the size is as stated
    sizes: np.ndarray  # (I, 2) width and height for which the boxes were drawn; NaN if unknown


def fit_sizes(facts: Sequence[ImageFacts], stated: np.ndarray, table: BoxTable) -> SizeFit:
    """Decide on the size of each image whose file has another size than stated.

    The size that fewer boxes of the image leave is right. If equally many leave both sizes, the other images of the split with the
    same kind of difference decide, if they agree. If no image of the split decides, likelihood decides: how probable it is that
    boxes drawn for one size all lie inside the other. If that is not clear either, the image is "stated-size-unclear" and nothing
    is changed.

    Args:
        stated: (I, 2) width and height; NaN if unknown.
        table: boxes of the split. Its `sizes` are not used.
    """
    known = np.array([(math.nan, math.nan) if fact.size is None else fact.size for fact in facts]).reshape(-1, 2)
    kinds = [_simple_kind(fact, size) for fact, size in zip(facts, stated, strict=True)]
    sizes = np.where(np.isnan(stated), known, stated)
    for kind in ("image-rotated", "image-resized"):
        differing = [place for place, one in enumerate(kinds) if one == kind]
        for place, is_stated in zip(differing, _are_stated(differing, known, stated, table), strict=True):
            if is_stated is None:
                kinds[place] = "stated-size-unclear"
            elif not is_stated:
                kinds[place] = "stated-size-wrong"
                sizes[place] = known[place]
    return SizeFit(kinds, sizes)


def _simple_kind(fact: ImageFacts, stated: np.ndarray) -> str | None:
    """Kind of finding that follows from the sizes alone."""
    if fact.size is None:
        return None
    is_stated = not np.isnan(stated).any()
    if is_stated and fact.size != tuple(stated):
        return "image-rotated" if fact.stored_size == tuple(stated) else "image-resized"
    is_square = fact.size[0] == fact.size[1]
    if fact.orientation in _FLIPPING or (fact.orientation in _TURNING and (is_square or not is_stated)):
        return "image-orientation-unclear"
    return None


def _are_stated(places: list[int], known: np.ndarray, stated: np.ndarray, table: BoxTable) -> list[bool | None]:
    """Whether the boxes of each image were drawn for the stated size. None: unclear."""
    if not places:
        return []
    by_boxes, log_odds, has_boxes = [], 0.0, []
    order = np.argsort(table.image, kind="stable")
    starts = np.searchsorted(table.image[order], places)
    ends = np.searchsorted(table.image[order], places, side="right")
    for place, start, end in zip(places, starts, ends, strict=True):
        mine = order[start:end]
        corners = table.corners[mine[table.is_number[mine]]]
        leaving_stated, leaving_known = (
            int(leaving(corners, np.broadcast_to(size[place], (len(corners), 2))).sum()) for size in (stated, known)
        )
        has_boxes.append(bool(len(corners)))
        by_boxes.append(None if leaving_stated == leaving_known else leaving_stated < leaving_known)
        if by_boxes[-1] is None and not leaving_stated:
            # The chance that a box drawn for one size also lies inside the other is about the ratio of their sides.
            log_odds += len(corners) * float(np.log(known[place] / stated[place]).sum())
    clear = {one for one in by_boxes if one is not None}
    fallback = clear.pop() if len(clear) == 1 else None
    if fallback is None and not clear and abs(log_odds) >= math.log(SURE):
        fallback = log_odds > 0
    # Without boxes, nothing has to be moved: only the stated size can be wrong.
    return [
        False if not has else fallback if one is None else one for one, has in zip(by_boxes, has_boxes, strict=True)
    ]
