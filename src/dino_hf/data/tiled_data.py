"""Data sets of tiles: large images become several rows, each with a part of the image, which is cut out when it is read."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import numpy as np
import PIL.Image
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Image, List, Value

from ..common.tiles import Tile, Tiling, read_tiling, split
from ..common.values import is_number, short_repr
from .rows import SMALLEST_SIDE, CocoData, box_columns, check_image_size

MIN_VISIBLE = 0.5  # a tile keeps a box if it shows at least this share of its area
MIN_SIDE = 4  # pixels; the whole image keeps a box if it has at least the area of this square when scaled to the area of a tile
EMPTY_TILES = 1.0  # default number of empty tiles in an epoch, for each tile with boxes
KEPT_PIXELS = 2**26  # decoded images that one process keeps, 3 bytes per pixel; at least one image is kept


class TileCounts(NamedTuple):
    """Numbers of a tiled data set."""

    images: int
    cut: int  # images that are larger than a tile
    tiles: int  # without whole images
    empty: int  # tiles without boxes
    boxes: int  # of the whole images, without crowds
    only_in_whole: int  # boxes that no tile shows by half, so only the whole image has them
    lost: int  # boxes that neither a tile nor the whole image has


class TiledImages:
    """The images of a tiled data set. A process keeps the images that it read last, so it decodes an image once for many tiles.

    Attributes:
        whole: the data set that was cut.
        tiling: size and overlap of the tiles.
        empty_tiles: number of empty tiles in an epoch, for each tile with boxes.
        counts: numbers of images, tiles and boxes.
        guard: called with the number of pixels of an image, for a context in which it is decoded. The trainer sets it, so that the
            workers decode large images one after another.
    """

    def __init__(self, whole: CocoData, tiling: Tiling, empty_tiles: float, counts: TileCounts):
        self.whole, self.tiling, self.empty_tiles, self.counts = whole, tiling, empty_tiles, counts
        self.guard: Callable[[int], AbstractContextManager] = _no_guard
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()  # row of the whole data -> (H, W, 3) uint8
        columns = whole.dataset.select_columns(["width", "height"]).with_format("arrow")[:]
        self.sizes = np.stack([columns[name].to_numpy() for name in ("width", "height")], axis=1)  # (I, 2)

    def __getstate__(self):
        return self.__dict__ | {"_kept": OrderedDict()}  # workers read their own images

    def __deepcopy__(self, memo):
        return self  # `datasets` copies the features with every change of columns

    def read(self, row: int, tile: Tile) -> PIL.Image.Image:
        """A part of an image.

        Args:
            row: row of the image in `whole`.
        Raises:
            OSError: the image cannot be read.
            ImageSizeError: it has another size than annotated.
        """
        size = tuple(self.sizes[row].tolist())
        if size[0] <= self.tiling.size[0] and size[1] <= self.tiling.size[1]:  # it has only one row
            return self._decode(row, size)
        if row not in self._kept:
            while self._kept and sum(image.size for image in self._kept.values()) > 3 * (
                KEPT_PIXELS - size[0] * size[1]
            ):
                self._kept.popitem(last=False)
            with self.guard(size[0] * size[1]):
                self._kept[row] = np.asarray(self._decode(row, size))
        self._kept.move_to_end(row)
        return PIL.Image.fromarray(self._kept[row][tile.y0 : tile.y1, tile.x0 : tile.x1])

    def _decode(self, row: int, size: tuple[int, int]) -> PIL.Image.Image:
        entry = self.whole.dataset[row]
        check_image_size(entry["image_id"], entry["image"], size)
        return entry["image"]


def _no_guard(num_pixels: int) -> AbstractContextManager:
    return nullcontext()


class _TileImage(Image):
    """Column of a `datasets.Dataset`: the row of an image in the whole data and its part (x0, y0, x1, y1), read as a PIL image."""

    pa_type: ClassVar[Any] = pa.list_(pa.int64())

    def __init__(self, images: TiledImages):
        super().__init__()
        self.images = images

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def decode_example(self, value, token_per_repo_id=None) -> PIL.Image.Image:
        return self.images.read(value[0], Tile(*value[1:]))


def tiled_images(data: CocoData) -> TiledImages | None:
    """The images behind a tiled data set; None if a data set is not tiled."""
    feature = getattr(data.dataset, "features", None) or {}
    return getattr(feature.get("image"), "images", None)


def whole_images(data: CocoData) -> CocoData:
    """The data set that a tiled data set was cut from. A data set that is not tiled is returned unchanged."""
    images = tiled_images(data)
    return data if images is None else images.whole


def row_name(image_id: int, source_id: int | None = None, tile: list[int] | None = None) -> str:
    """Name of a row for messages: the id of its image, and its tile.

    Args:
        source_id, tile: columns of a tiled data set.
    """
    if source_id is None:
        return str(image_id)
    return f"{source_id} (tile from {tile[0]}, {tile[1]} to {tile[2]}, {tile[3]})"


def id_name(data: CocoData, image_id: int) -> str:
    """Name of an image id for messages; in a tiled data set, ids are numbers of tiles."""
    places = np.flatnonzero(np.array(data.dataset["image_id"][:]) == image_id)
    if tiled_images(data) is None or not len(places):
        return str(image_id)
    return row_name(image_id, **data.dataset.select_columns(["source_id", "tile"])[int(places[0])])


def cut_into_tiles(
    data: CocoData,
    tiles: int | str | tuple[int, int],
    overlap: float | None = None,
    empty_tiles: float = EMPTY_TILES,
) -> CocoData:
    """Cut the images of a data set into overlapping tiles, as `predict` cuts them. No image is read or written.

    An image that is larger than a tile becomes several rows: the whole image and its tiles. Other images stay as they are.

    - A tile keeps a box, cut to the tile, if it shows at least half of the area that the image shows. Other boxes are dropped.
      So an object of up to 2.4 times the overlap is in at least one tile.
    - The whole image keeps a box that is not too small: scaled to the area of a tile, it has at least the area of 4 x 4 pixels.
    - Crowd regions are cut to every tile that shows a part of them. `area` is multiplied by the visible share.

    Rows have `image_id` from 0 on, because ids must differ. `source_id` is the id of the whole image, `tile` the part of it, and
    `width`, `height` and `objects` belong to the tile. The image is read when a row is read.

    Args:
        data: from `load_data` or `load_coco`. Split it into training and held-out images before it is cut.
        tiles: side or (width, height) in pixels, as in `predict`.
        overlap: smallest overlap of neighbouring tiles, relative to their side, in [0, 0.9]. None: 0.2.
        empty_tiles: most tiles without boxes in an epoch, for each row with boxes; `TileSampler` draws others in each epoch.
    Raises:
        ValueError: a setting is invalid, the data are tiles already, or an image has no width and height.
    """
    tiling = read_tiling(tiles, overlap)
    if tiling is None:
        raise ValueError(
            f"tiles={tiles!r} must be a side, or width x height, of at least 32 pixels, such as 640 or 640x480."
        )
    check_empty_tiles(empty_tiles)
    if tiled_images(data) is not None:
        raise ValueError(f"{data.name} is cut into tiles already; cut the whole images.")
    columns = data.dataset.select_columns(["image_id", "file_name", "width", "height", "objects"]).with_format("arrow")[
        :
    ]
    parts = [_cut(row, number, tiling) for number, row in enumerate(columns.to_pylist())]
    views = [view for part in parts for view in part.views]
    boxes = np.concatenate([view.boxes for view in views])
    ends = np.cumsum([0, *(len(view.boxes) for view in views)]).astype(np.int32)
    objects = {
        "category": pa.array(np.concatenate([view.category for view in views])),
        "bbox": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
        "area": pa.array(np.concatenate([view.area for view in views])),
        "iscrowd": pa.array(np.concatenate([view.iscrowd for view in views])),
    }
    is_tile = np.array([not view.is_whole for view in views], dtype=bool)
    is_empty = np.array([not (view.iscrowd == 0).any() for view in views], dtype=bool)
    counts = TileCounts(
        images=len(parts),
        cut=sum(len(part.views) > 1 for part in parts),
        tiles=int(is_tile.sum()),
        empty=int((is_tile & is_empty).sum()),
        boxes=sum(part.num_boxes for part in parts),
        only_in_whole=sum(part.only_in_whole for part in parts),
        lost=sum(part.lost for part in parts),
    )
    images = TiledImages(data, tiling, float(empty_tiles), counts)
    tile = np.array([view.tile for view in views], dtype=np.int64)  # (N, 4)
    source = np.repeat(np.arange(len(parts)), [len(part.views) for part in parts])
    features = Features(
        {
            "image_id": Value("int64"),
            "source_id": Value("int64"),
            "tile": List(Value("int64")),
            "image": _TileImage(images),
            "file_name": Value("string"),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": data.dataset.features["objects"],
        }
    )
    table = pa.table(
        {
            "image_id": pa.array(np.arange(len(views))),
            "source_id": columns["image_id"].take(pa.array(source)),
            "tile": pa.array(tile.tolist(), pa.list_(pa.int64())),
            "image": pa.array(np.concatenate([source[:, None], tile], axis=1).tolist(), pa.list_(pa.int64())),
            "file_name": columns["file_name"].take(pa.array(source)),
            "width": pa.array(tile[:, 2] - tile[:, 0]),
            "height": pa.array(tile[:, 3] - tile[:, 1]),
            "objects": pa.StructArray.from_arrays(
                [pa.ListArray.from_arrays(pa.array(ends), values) for values in objects.values()], list(objects)
            ),
        }
    )
    table = table.cast(features.arrow_schema)
    # By default, `datasets` would hash all whole images for the fingerprint.
    fingerprint = hashlib.sha256(f"{data.dataset._fingerprint} {tiling} {empty_tiles}".encode()).hexdigest()[:16]
    return data._replace(dataset=Dataset(table, info=DatasetInfo(features=features), fingerprint=fingerprint))


def check_empty_tiles(empty_tiles: float) -> None:
    """Raise ValueError for an invalid number of empty tiles, see `cut_into_tiles`."""
    if not is_number(empty_tiles) or empty_tiles < 0:
        raise ValueError(
            f"empty_tiles={short_repr(empty_tiles)} must be a number of at least 0: tiles without boxes in an epoch, for each tile "
            "with boxes."
        )


class _View(NamedTuple):
    """One row: a tile or a whole image, with its n boxes."""

    tile: Tile
    is_whole: bool
    category: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64 (x, y, w, h) in pixels of the tile
    area: np.ndarray  # (n,) float64
    iscrowd: np.ndarray  # (n,) int64


class _Cut(NamedTuple):
    """The rows of one image."""

    views: list[_View]
    num_boxes: int  # without crowds
    only_in_whole: int
    lost: int


def _cut(row: dict, number: int, tiling: Tiling) -> _Cut:
    if row["width"] is None:
        raise ValueError(
            f"Image {row['image_id']} has no width and height in the data, so it cannot be cut. load_data and load_coco read the "
            "sizes from the files."
        )
    size, objects = (row["width"], row["height"]), row["objects"]
    boxes = np.array(objects["bbox"], dtype=np.float64).reshape(-1, 4)
    category, iscrowd = (np.array(objects[name], dtype=np.int64) for name in ("category", "iscrowd"))
    area, is_crowd = np.array(objects["area"], dtype=np.float64), iscrowd.astype(bool)
    whole, *tiles = split(size, *tiling)
    if not tiles:
        return _Cut([_View(whole, True, category, boxes, area, iscrowd)], int((~is_crowd).sum()), 0, 0)
    inside = _clip(boxes, whole)
    scale = np.prod(tiling.size) / np.prod(size)
    is_large = (inside[:, 2:].prod(1) * scale >= MIN_SIDE**2) | is_crowd
    views = [_View(whole, True, category[is_large], boxes[is_large], area[is_large], iscrowd[is_large])]
    in_tile = np.zeros(len(boxes), dtype=bool)
    for tile in tiles:
        visible = _clip(boxes, tile)
        share = visible[:, 2:].prod(1) / inside[:, 2:].prod(1).clip(min=1e-9)
        kept = (visible[:, 2:] >= SMALLEST_SIDE).all(1) & ((share >= MIN_VISIBLE - 1e-9) | is_crowd)
        in_tile |= kept
        moved = visible[kept] - np.array([tile.x0, tile.y0, 0, 0])
        views.append(_View(tile, False, category[kept], moved, area[kept] * share[kept], iscrowd[kept]))
    only_in_whole, lost = (~in_tile & is_large & ~is_crowd).sum(), (~in_tile & ~is_large).sum()
    return _Cut(views, int((~is_crowd).sum()), int(only_in_whole), int(lost))


def _clip(boxes: np.ndarray, tile: Tile) -> np.ndarray:
    """(N, 4) x, y, w, h of the parts of boxes inside a tile, in pixels of the image. Sides are 0 without a part."""
    low = np.clip(boxes[:, :2], tile[:2], tile[2:])
    high = np.clip(boxes[:, :2] + boxes[:, 2:], tile[:2], tile[2:])
    return np.concatenate([low, high - low], axis=1)


def image_rows(data: CocoData) -> np.ndarray | None:
    """(N,) row of the image of each tile in the whole data. None: the data are not tiled."""
    return None if tiled_images(data) is None else _parts(data)[:, 0]


def _parts(data: CocoData) -> np.ndarray:
    """(N, 5) row of the image in the whole data, and x0, y0, x1, y1 of each tile."""
    column = data.dataset.select_columns("image").with_format("arrow")[:]["image"].combine_chunks()
    return column.flatten().to_numpy().reshape(-1, 5)


def drawing_factors(data: CocoData) -> np.ndarray | None:
    """(N,) how often an epoch draws each row of a tiled data set on average. None: the data are not tiled.

    Tiles without boxes share `empty_tiles` draws for each row with boxes. All other rows, and images that are not cut, are drawn
    once.
    """
    images = tiled_images(data)
    if images is None:
        return None
    _, is_crowd, row = box_columns(data)
    has_boxes = np.bincount(row[~is_crowd], minlength=len(data.dataset)) > 0
    parts = _parts(data)
    is_whole = (parts[:, 3:] - parts[:, 1:3] == images.sizes[parts[:, 0]]).all(1)
    is_empty = ~has_boxes & ~is_whole
    factors = np.ones(len(has_boxes))
    if is_empty.any():
        factors[is_empty] = min(1.0, images.empty_tiles * has_boxes.sum() / is_empty.sum())
    return factors
