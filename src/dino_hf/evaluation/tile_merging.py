"""Detections in the tiles of an evaluation, merged to whole images as soon as all tiles of an image are there."""

from collections.abc import Iterator, Mapping

import numpy as np

from ..common.tiles import Tile
from ..data.rows import CocoData
from ..data.tiled_data import tiled_images
from ..inference.predictor import Detections
from ..inference.tiling import merge


class TileMerging:
    """The detections of one evaluation, by image and tile.

    Args:
        data: tiled data set.
        max_detections: number of detections to keep in an image.
    """

    def __init__(self, data: CocoData, max_detections: int):
        images = tiled_images(data)
        self.tiling, self.max_detections = images.tiling, max_detections
        self._tiles: dict[int, dict[int, Tile]] = {}  # image id -> tile number -> tile
        self._image_of: dict[int, int] = {}
        for row in data.dataset.select_columns(["image_id", "source_id", "tile"]):
            self._tiles.setdefault(row["source_id"], {})[row["image_id"]] = Tile(*row["tile"])
            self._image_of[row["image_id"]] = row["source_id"]
        sizes = zip(images.whole.dataset["image_id"][:], images.sizes.tolist(), strict=True)
        self._whole = {image_id: Tile(0, 0, *size) for image_id, size in sizes}
        self.restart()

    def restart(self) -> None:
        """Forget all detections."""
        self._found: dict[int, dict[int, Detections]] = {}  # image id -> tile number -> detections
        self._merged: dict[int, Detections] = {}

    def add(self, number: int, found: Mapping[str, np.ndarray]) -> None:
        """Add the detections of a tile, in pixels of the tile."""
        image_id = self._image_of[number]
        in_tiles = self._found.setdefault(image_id, {})
        in_tiles[number] = Detections.sorted(found["boxes"], found["scores"], found["labels"])
        if len(in_tiles) == len(self._tiles[image_id]):
            self._merged[image_id] = self._merge(image_id, self._found.pop(image_id))

    def take(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The merged detections of each image; the collection is empty afterwards.

        If only a part of the data was evaluated, an image may lack tiles. Then those that were evaluated are merged.
        """
        merged = self._merged | {image_id: self._merge(image_id, found) for image_id, found in self._found.items()}
        self.restart()
        for image_id, one in merged.items():
            yield image_id, {"boxes": one.boxes, "scores": one.scores, "labels": one.labels}

    def _merge(self, image_id: int, found: dict[int, Detections]) -> Detections:
        tiles, whole = self._tiles[image_id], self._whole[image_id]
        views = {tiles[number]: found[number] for number in sorted(found)}
        in_whole = views.pop(whole, Detections.sorted([], [], []))
        if not views:
            return in_whole
        overlap = tuple(self.tiling.overlap * side for side in self.tiling.size)
        return merge([in_whole, *views.values()], [whole, *views], overlap, self.max_detections)
