"""Sizes of images that the annotations do not state: without them, nothing tells corners from (x, y, width, height)."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from ..common.images import upright_size
from .raw import RawSplit, open_image


def fill_sizes(split: RawSplit, replace: bool = False) -> RawSplit:
    """Read width and height from the start of each image file where the annotations have none.

    Images that cannot be opened keep what they have: the check of image files names them.

    Args:
        replace: also read them where the annotations have them.
    """
    unknown = [
        place
        for place, entry in enumerate(split.images)
        if replace or None in (entry.get("width"), entry.get("height"))
    ]
    if not unknown:
        return split
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        sizes = pool.map(_size, [split.images[place] for place in unknown])
        found = dict(zip(unknown, sizes, strict=True))
    images = [
        entry if found.get(place) is None else {**entry, "width": found[place][0], "height": found[place][1]}
        for place, entry in enumerate(split.images)
    ]
    return split._replace(images=images)


def _size(entry: Mapping) -> tuple[int, int] | None:
    try:
        with open_image(entry) as image:
            return upright_size(image)
    except OSError:
        return None
