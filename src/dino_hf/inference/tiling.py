"""Large images in overlapping tiles at their own resolution, and the detections of all tiles merged."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms

from .boxes import overlap as box_overlap
from .predictor import Detections, TooLarge, try_on_image

# Images -> detections, lazily, in their order. What does not fit into memory stays a `TooLarge`.
Detect = Callable[[Iterable[Image.Image | TooLarge]], Iterator[Detections | TooLarge]]

# Of two boxes of one object: intersection over union, or over the smaller where one may be a part of the other.
_SAME = 0.5
_BORDER = 0.01  # of a tile's side: so close to its border, and within 2 pixels, a box counts as cut off


class Tile(NamedTuple):
    """Part of an image, (x0, y0) inside and (x1, y1) outside, in pixels."""

    x0: int
    y0: int
    x1: int
    y1: int


def read_tiles(tiles: int | str | tuple[int, int]) -> tuple[int, int]:
    """640, "640", "640x480" or (640, 480) -> (width, height)."""
    try:
        sides = [int(side) for side in (str(tiles).lower().split("x") if isinstance(tiles, int | str) else tiles)]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides, default=0) < 32:
        raise ValueError(
            f"tiles={tiles!r} must be a side, or width x height, of at least 32 pixels, such as 640 or 640x480."
        )
    return sides[0], sides[-1]


def detect_tiled(detect: Detect, tile_size: tuple[int, int], overlap: float = 0.2) -> Detect:
    """The same on large images: on the whole image, and on tiles where it is larger than one.

    The answers are merged class by class.

    1. Trusted are boxes that a tile shows whole, and those on the whole image that are too large to fit into the overlap of two
       tiles. Where two have an IoU above 0.5, the one with the lower score goes (non-maximum suppression).
    2. Distrusted are boxes that touch a border inside the image, where they may be cut off; and those on the whole image that
       fit into the overlap: some tile has shown them whole, and larger. They go where more than half of them, or of a trusted
       box, is covered by the other.
    3. What is left was nowhere seen whole. Two pieces are of one object if their parts in what both tiles show have an IoU above
       0.5; they become the box around them.

    Args:
        detect: images to detections.
        tile_size: (width, height) in pixels of the image.
        overlap: of neighbours, at least, relative to their side, in [0, 0.9]. Objects that fit into it are seen whole.
    Raises:
        ValueError: a setting is out of range.
    """
    check_overlap(overlap)

    def detect_all(images: Iterable[Image.Image]) -> Iterator[Detections]:
        layouts: deque[list[Tile]] = deque()

        def parts() -> Iterator[Image.Image]:
            for image in images:
                if isinstance(image, TooLarge):
                    layouts.append([Tile(0, 0, image.width, image.height)])
                    yield image
                    continue
                tiles = split(image.size, tile_size, overlap)
                layouts.append(tiles)
                yield image
                yield from (try_on_image(partial(Image.Image.crop, box=tile), image) for tile in tiles[1:])
                del image  # the next image may need its memory

        answers = detect(parts())
        for whole in answers:
            tiles = layouts.popleft()
            rest = list(itertools.islice(answers, len(tiles) - 1))
            if too_large := [answer for answer in (whole, *rest) if isinstance(answer, TooLarge)]:
                yield too_large[0]
                continue
            yield merge([whole, *rest], tiles, tuple(overlap * side for side in tile_size)) if rest else whole

    return detect_all


def check_overlap(overlap: float) -> None:
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"tile_overlap={overlap} must be in [0, 0.9], a part of a tile's side.")


def split(size: tuple[int, int], tile_size: tuple[int, int], overlap: float) -> list[Tile]:
    """The whole image, and if it is larger than a tile, tiles of one size, evenly spread, that cover it.

    Args:
        size, tile_size: (width, height).
    """
    starts = [_starts(side, min(side, tile), overlap) for side, tile in zip(size, tile_size, strict=True)]
    width, height = (min(side, tile) for side, tile in zip(size, tile_size, strict=True))
    tiles = [Tile(x, y, x + width, y + height) for y in starts[1] for x in starts[0]]
    return [Tile(0, 0, *size), *tiles] if len(tiles) > 1 else [Tile(0, 0, *size)]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    num_steps = math.ceil((side - tile) / (tile * (1 - overlap)) - 1e-9)  # 0.8 of 640 is 512, and a little in floats
    return [round(step * (side - tile) / max(1, num_steps)) for step in range(num_steps + 1)]


def merge(answers: list[Detections], tiles: list[Tile], overlap: tuple[float, float]) -> Detections:
    """One answer of those on the tiles of an image, as `detect_tiled` says.

    Args:
        answers: of each tile, in its pixels.
        tiles: the first is the whole image.
        overlap: (width, height) in pixels of what two neighbours share at least.
    """
    width, height = tiles[0][2:]
    boxes, trusted = [], []
    for answer, tile in zip(answers, tiles, strict=True):
        boxes.append(answer.boxes + np.array([tile.x0, tile.y0, tile.x0, tile.y0]))
        sizes = answer.boxes[:, 2:] - answer.boxes[:, :2]
        if tile == tiles[0]:
            trusted.append((sizes > overlap).any(axis=1))
            continue
        margins = [max(2.0, _BORDER * side) for side in (tile.x1 - tile.x0, tile.y1 - tile.y0)]
        inner = np.array([tile.x0 > 0, tile.y0 > 0, tile.x1 < width, tile.y1 < height])  # (4,)
        near = np.abs(boxes[-1] - tile) <= margins * 2  # (N, 4)
        # A box that sticks out of its tile goes through the border too.
        out = (boxes[-1] - tile) * (-1, -1, 1, 1) > 0
        trusted.append(~((near | out) & inner).any(axis=1))
    boxes, trusted = np.concatenate(boxes), np.concatenate(trusted)
    scores, labels = (np.concatenate([getattr(answer, name) for answer in answers]) for name in ("scores", "labels"))
    seen_in = np.repeat(np.array(tiles, dtype=np.float64), [len(answer.scores) for answer in answers], axis=0)

    whole = np.flatnonzero(trusted)
    whole = whole[batched_nms(*(torch.from_numpy(values[whole]) for values in (boxes, scores, labels)), _SAME).numpy()]
    joined: list[list[int]] = []  # of each other object, its pieces
    for index in sorted(np.flatnonzero(~trusted), key=lambda index: -scores[index]):
        of_class = boxes[whole[labels[whole] == labels[index]]]
        if (box_overlap(boxes[index], of_class, over_smaller=True) > _SAME).any():
            continue
        same = [
            pieces
            for pieces in joined
            if labels[pieces[0]] == labels[index]
            and _agree(boxes[index], seen_in[index], boxes[pieces], seen_in[pieces])
        ]
        joined = [pieces for pieces in joined if pieces not in same]
        joined.append([*itertools.chain(*same), index])  # a middle piece joins both ends
    around = [np.concatenate([boxes[pieces, :2].min(0), boxes[pieces, 2:].max(0)]) for pieces in joined]
    surest = [max(pieces, key=lambda index: scores[index]) for pieces in joined]
    kept = [*whole, *surest]
    return Detections.sorted([*boxes[whole], *around], scores[kept], labels[kept])


def _agree(box: np.ndarray, tile: np.ndarray, boxes: np.ndarray, tiles: np.ndarray) -> bool:
    """Whether a box is of the object of others: what a tile shows of it is what it shows of them."""
    shared = np.concatenate([np.maximum(tiles[:, :2], tile[:2]), np.minimum(tiles[:, 2:], tile[2:])], axis=1)  # (N, 4)
    low, high = shared[:, [0, 1, 0, 1]], shared[:, [2, 3, 2, 3]]
    return bool((box_overlap(np.clip(box, low, high), np.clip(boxes, low, high)) > _SAME).any())
