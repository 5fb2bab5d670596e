"""Images of another size than the annotations state: which of the two sizes the boxes are for is decided by what they fit."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .box_table import BoxTable, leaving
from .image_facts import ImageFacts

_FLIPPING, _TURNING = (2, 3, 4), (5, 6, 7, 8)  # EXIF orientations that keep, and that swap width and height
SURE = 20.0  # times as likely must one of two sizes be, where the boxes fit both


class SizeFit(NamedTuple):
    """Of the images of a split."""

    kinds: list[str | None]  # of finding that the size of each image is; None if it is as stated
    sizes: np.ndarray  # (I, 2) width and height that the boxes are for; not a number if unknown


def fit_sizes(facts: Sequence[ImageFacts], stated: np.ndarray, table: BoxTable) -> SizeFit:
    """Decide for each image whose stated size is not that of the file.

    The boxes of an image tell which size they are for if fewer of them leave it. Where they fit both, the other images of the split
    that differ in this way decide, if they agree. If none tells, it counts how likely boxes for one size would all lie in the other
    too. If that does not tell either, the image is "stated-size-unclear", and nothing is changed.

    Args:
        stated: (I, 2) width and height; not a number if unknown.
        table: of the split; its `sizes` are not looked at.
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
    """By sizes alone."""
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
    """Of each image, whether its boxes are for the stated size; None if that is not clear."""
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
            # A box of one size lies in the other too by a chance of about the ratio of their sides.
            log_odds += len(corners) * float(np.log(known[place] / stated[place]).sum())
    clear = {one for one in by_boxes if one is not None}
    fallback = clear.pop() if len(clear) == 1 else None
    if fallback is None and not clear and abs(log_odds) >= math.log(SURE):
        fallback = log_odds > 0
    # Without boxes there is nothing to move: only the statement can be wrong.
    return [
        False if not has else fallback if one is None else one for one, has in zip(by_boxes, has_boxes, strict=True)
    ]
