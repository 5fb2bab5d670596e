"""Detect in large images: cut them into overlapping tiles at full resolution, and merge the detections of all tiles."""

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

# Images -> detections, in the same order, computed when requested. An image that does not fit into memory gives a `TooLarge`.
Detect = Callable[[Iterable[Image.Image | TooLarge]], Iterator[Detections | TooLarge]]

# Boxes with a higher overlap belong to one object: IoU, or intersection over the smaller box if a box may be a part of the other.
_SAME = 0.5
_BORDER = 0.01  # share of a tile's side, at least 2 pixels: a box this close to the border of its tile may be cut off


class Tile(NamedTuple):
    """Part of an image in pixels. (x0, y0) is its first pixel; (x1, y1) is one beyond its last pixel."""

    x0: int
    y0: int
    x1: int
    y1: int


def read_tiles(tiles: int | str | tuple[int, int]) -> tuple[int, int]:
    """(width, height) of tiles given as 640, "640", "640x480" or (640, 480).

    Raises:
        ValueError: the text has another form, or a side is below 32 pixels.
    """
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
    """A detector for large images: it runs on the whole image, and on tiles if the image is larger than a tile.

    The detections of each class are merged in three steps.

    1. A box is complete if it does not touch a border of its tile inside the image. A box found in the whole image is complete
       if it is too large for the overlap of two tiles. If two complete boxes have an IoU above 0.5, the box with the lower
       score is dropped (non-maximum suppression).
    2. All other boxes are doubtful. A box at a border of its tile may be cut off. A box found in the whole image that fits into
       the overlap is shown larger, and completely, by a tile. A doubtful box is dropped if it overlaps a complete box by more
       than half of the smaller box.
    3. The remaining doubtful boxes are pieces of objects that no tile shows completely. Two pieces belong to one object if they
       have an IoU above 0.5 in the area that both tiles show. The pieces of an object become the box around them.

    Args:
        detect: detector, images -> detections.
        tile_size: (width, height) in pixels of the image.
        overlap: smallest overlap of neighbours, relative to their side, in [0, 0.9]. A tile shows objects of this size completely.
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

        results = detect(parts())
        for whole in results:
            tiles = layouts.popleft()
            rest = list(itertools.islice(results, len(tiles) - 1))
            if too_large := [result for result in (whole, *rest) if isinstance(result, TooLarge)]:
                yield too_large[0]
                continue
            yield merge([whole, *rest], tiles, tuple(overlap * side for side in tile_size)) if rest else whole

    return detect_all


def check_overlap(overlap: float) -> None:
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"tile_overlap={overlap} must be in [0, 0.9], relative to the side of a tile.")


def split(size: tuple[int, int], tile_size: tuple[int, int], overlap: float) -> list[Tile]:
    """The whole image as a tile. If it is larger than a tile, also evenly spread tiles of one size that cover it.

    Args:
        size, tile_size: (width, height).
    """
    starts = [_starts(side, min(side, tile), overlap) for side, tile in zip(size, tile_size, strict=True)]
    width, height = (min(side, tile) for side, tile in zip(size, tile_size, strict=True))
    tiles = [Tile(x, y, x + width, y + height) for y in starts[1] for x in starts[0]]
    return [Tile(0, 0, *size), *tiles] if len(tiles) > 1 else [Tile(0, 0, *size)]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    num_steps = math.ceil(
        (side - tile) / (tile * (1 - overlap)) - 1e-9
    )  # 640 * 0.8 is slightly more than 512 in floating point
    return [round(step * (side - tile) / max(1, num_steps)) for step in range(num_steps + 1)]


def merge(results: list[Detections], tiles: list[Tile], overlap: tuple[float, float]) -> Detections:
    """Merge the detections of the tiles of an image, as `detect_tiled` describes.

    Args:
        results: detections of each tile, in pixels of the tile.
        tiles: the first tile is the whole image.
        overlap: (width, height) in pixels of the smallest overlap of neighbours.
    """
    width, height = tiles[0][2:]
    boxes, is_complete = [], []
    for result, tile in zip(results, tiles, strict=True):
        boxes.append(result.boxes + np.array([tile.x0, tile.y0, tile.x0, tile.y0]))
        sizes = result.boxes[:, 2:] - result.boxes[:, :2]
        if tile == tiles[0]:
            is_complete.append((sizes > overlap).any(axis=1))
            continue
        margins = [max(2.0, _BORDER * side) for side in (tile.x1 - tile.x0, tile.y1 - tile.y0)]
        inner = np.array([tile.x0 > 0, tile.y0 > 0, tile.x1 < width, tile.y1 < height])  # (4,)
        near = np.abs(boxes[-1] - tile) <= margins * 2  # (N, 4)
        # A box that extends beyond its tile is cut off, too.
        out = (boxes[-1] - tile) * (-1, -1, 1, 1) > 0
        is_complete.append(~((near | out) & inner).any(axis=1))
    boxes, is_complete = np.concatenate(boxes), np.concatenate(is_complete)
    scores, labels = (np.concatenate([getattr(result, name) for result in results]) for name in ("scores", "labels"))
    seen_in = np.repeat(np.array(tiles, dtype=np.float64), [len(result.scores) for result in results], axis=0)

    whole = np.flatnonzero(is_complete)
    whole = whole[batched_nms(*(torch.from_numpy(values[whole]) for values in (boxes, scores, labels)), _SAME).numpy()]
    joined: list[list[int]] = []  # the pieces of each object that no tile shows completely
    for index in sorted(np.flatnonzero(~is_complete), key=lambda index: -scores[index]):
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
        joined.append([*itertools.chain(*same), index])  # a piece in the middle joins the pieces at both ends
    around = [np.concatenate([boxes[pieces, :2].min(0), boxes[pieces, 2:].max(0)]) for pieces in joined]
    best = [max(pieces, key=lambda index: scores[index]) for pieces in joined]
    kept = [*whole, *best]
    return Detections.sorted([*boxes[whole], *around], scores[kept], labels[kept])


def _agree(box: np.ndarray, tile: np.ndarray, boxes: np.ndarray, tiles: np.ndarray) -> bool:
    """Whether a box belongs to the object of other boxes: they overlap in an area that both tiles show."""
    shared = np.concatenate([np.maximum(tiles[:, :2], tile[:2]), np.minimum(tiles[:, 2:], tile[2:])], axis=1)  # (N, 4)
    low, high = shared[:, [0, 1, 0, 1]], shared[:, [2, 3, 2, 3]]
    return bool((box_overlap(np.clip(box, low, high), np.clip(boxes, low, high)) > _SAME).any())
