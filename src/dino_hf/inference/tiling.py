"""Detect in large images: cut them into overlapping tiles at full resolution, and merge the detections of all tiles."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms

from ..common.tiles import OVERLAP, Tile, Tiling, check_overlap, read_tiling, split
from .boxes import overlap as box_overlap
from .predictor import Detections, TooLarge, try_on_image

# Images -> detections, in the same order, computed when requested. An image that does not fit into memory gives a `TooLarge`.
Detect = Callable[[Iterable[Image.Image | TooLarge]], Iterator[Detections | TooLarge]]

# Boxes with a higher overlap belong to one object: IoU, or intersection over the smaller box if a box may be a part of the other.
_SAME = 0.5
# A box counts against a better box only from this share of its score on. Above a threshold of 0.5 all boxes count. Evaluation
# also keeps low scores, which must not drop or stretch a confident box.
_COMPARABLE = 0.5
_MORE = 4  # evaluation merges this many times the kept detections: neighbouring tiles and the whole image repeat many
_BORDER = 0.01  # share of a tile's side, at least 2 pixels: a box this close to the border of its tile may be cut off


def detect_tiled(
    detect: Detect, tile_size: tuple[int, int], overlap: float = OVERLAP, max_detections: int | None = None
) -> Detect:
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

    In steps 2 and 3, a box counts against a better box only if its score is at least half as high. A piece with a lower score is
    dropped, so that it does not stretch the box of the better piece.

    Args:
        detect: detector, images -> detections.
        tile_size: (width, height) in pixels of the image.
        overlap: smallest overlap of neighbours, relative to their side, in [0, 0.9]. A tile shows objects of this size completely.
        max_detections: number of detections to keep in an image that is cut, for evaluation; the highest scores are kept. Then only
            the best `4 * max_detections` detections of all tiles are merged. None: all.
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
            in_pixels = tuple(overlap * side for side in tile_size)
            yield merge([whole, *rest], tiles, in_pixels, max_detections) if rest else whole

    return detect_all


def trained_tiling(model) -> Tiling | None:
    """The tiles that a model was trained on, by its record. The record is untrusted, so a malformed one counts as missing."""
    record = getattr(getattr(model, "config", None), "provenance", None)
    for name in ("training", "tiles"):
        record = record.get(name) if isinstance(record, dict) else None
    try:
        return None if record is None else read_tiling(tuple(record["size"]), float(record["overlap"]))
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def choose_tiling(tiles: int | str | tuple[int, int] | None, overlap: float | None, model=None) -> Tiling | None:
    """The tiles to detect in: those that the user chose, else those that the model was trained on. None: no tiles.

    Args:
        tiles, overlap: as in `read_tiling`. `tiles=None`: the tiles of the model.
    """
    chosen = read_tiling(tiles, overlap)
    trained = trained_tiling(model) if tiles is None else None
    if trained is None:
        return chosen
    return trained if overlap is None else trained._replace(overlap=overlap)


def merge(
    results: list[Detections],
    tiles: list[Tile],
    overlap: tuple[float, float],
    max_detections: int | None = None,
) -> Detections:
    """Merge the detections of the tiles of an image, as `detect_tiled` describes.

    Args:
        results: detections of each tile, in pixels of the tile.
        tiles: the first tile is the whole image.
        overlap: (width, height) in pixels of the smallest overlap of neighbours.
        max_detections: as in `detect_tiled`.
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
    if max_detections is not None and len(scores) > _MORE * max_detections:
        best = np.sort(np.argsort(-scores, kind="stable")[: _MORE * max_detections])
        boxes, is_complete, scores, labels, seen_in = (
            values[best] for values in (boxes, is_complete, scores, labels, seen_in)
        )

    whole = np.flatnonzero(is_complete)
    whole = whole[batched_nms(*(torch.from_numpy(values[whole]) for values in (boxes, scores, labels)), _SAME).numpy()]
    joined = _join_pieces(np.flatnonzero(~is_complete), whole, boxes, scores, labels, seen_in)
    around = [np.concatenate([boxes[pieces, :2].min(0), boxes[pieces, 2:].max(0)]) for pieces in joined]
    best = [max(pieces, key=lambda index: scores[index]) for pieces in joined]
    kept = [*whole, *best]
    merged = Detections.sorted([*boxes[whole], *around], scores[kept], labels[kept])
    return merged if max_detections is None else merged.keep(slice(max_detections))


def _join_pieces(
    doubtful: np.ndarray,
    whole: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    seen_in: np.ndarray,
) -> list[list[int]]:
    """The pieces of each object that no tile shows completely.

    Args:
        doubtful, whole: indices of the doubtful boxes and of the complete boxes.
        boxes: (N, 4) in pixels of the image.
        scores, labels: (N,)
        seen_in: (N, 4) tile of each box.
    """
    joined: dict[int, list[int]] = {}  # number of an object -> its pieces, best first
    pieces: dict[int, list[int]] = {}  # label -> all pieces
    object_of = np.full(len(scores), -1)
    for index in doubtful[np.argsort(-scores[doubtful], kind="stable")].tolist():
        label, enough = labels[index], _COMPARABLE * scores[index]
        rivals = whole[(labels[whole] == label) & (scores[whole] >= enough)]
        if (box_overlap(boxes[index], boxes[rivals], over_smaller=True) > _SAME).any():
            continue
        others = np.array(pieces.setdefault(int(label), []), dtype=np.int64)
        same = others[_agree(boxes[index], seen_in[index], boxes[others], seen_in[others])]
        numbers = list(dict.fromkeys(object_of[same].tolist()))
        if any(_COMPARABLE * scores[joined[number]].max() > scores[index] for number in numbers):
            continue
        # A piece in the middle joins the pieces at both ends.
        joined[index] = [*itertools.chain.from_iterable(joined.pop(number) for number in numbers), index]
        object_of[joined[index]] = index
        pieces[int(label)].append(index)
    return list(joined.values())


def _agree(box: np.ndarray, tile: np.ndarray, boxes: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """(N,) whether a box belongs to the object of each of N boxes: they overlap in an area that both tiles show."""
    shared = np.concatenate([np.maximum(tiles[:, :2], tile[:2]), np.minimum(tiles[:, 2:], tile[2:])], axis=1)  # (N, 4)
    low, high = shared[:, [0, 1, 0, 1]], shared[:, [2, 3, 2, 3]]
    return box_overlap(np.clip(box, low, high), np.clip(boxes, low, high)) > _SAME
