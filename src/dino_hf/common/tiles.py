"""Geometry of tiles: overlapping parts of one size that cover a large image. Prediction and training cut images alike."""

import math
from typing import NamedTuple

NO_TILES = "none"  # the setting of a user who wants no tiles
OVERLAP = 0.2  # default overlap of neighbouring tiles, relative to their side


class Tile(NamedTuple):
    """Part of an image in pixels. (x0, y0) is its first pixel; (x1, y1) is one beyond its last pixel."""

    x0: int
    y0: int
    x1: int
    y1: int


class Tiling(NamedTuple):
    """Size and overlap of the tiles of large images."""

    size: tuple[int, int]  # (width, height) of a tile in pixels
    overlap: float = OVERLAP  # smallest overlap of neighbouring tiles, relative to their side

    @property
    def text(self) -> str:
        """Size and overlap, for messages."""
        return f"{self.size[0]} x {self.size[1]} pixels with an overlap of {self.overlap:g}"

    def as_dict(self) -> dict:
        return {"size": list(self.size), "overlap": self.overlap}


def read_tiles(tiles: int | str | tuple[int, int]) -> tuple[int, int]:
    """(width, height) of tiles given as 640, "640", "640x480" or (640, 480).

    Raises:
        ValueError: the text has another form, or a side is below 32 pixels.
    """
    try:
        sides = [int(side) for side in (str(tiles).lower().split("x") if isinstance(tiles, int | str) else tiles)]
    except (TypeError, ValueError, OverflowError):  # int(inf) overflows
        sides = []
    if len(sides) not in (1, 2) or min(sides, default=0) < 32:
        raise ValueError(
            f"tiles={tiles!r} must be a side, or width x height, of at least 32 pixels, such as 640 or 640x480."
        )
    return sides[0], sides[-1]


def read_tiling(tiles: int | str | tuple[int, int] | None, overlap: float | None = None) -> Tiling | None:
    """The tiling of two settings. None: no tiles.

    Args:
        tiles: as in `read_tiles`; None or "none": no tiles.
        overlap: None: 0.2.
    Raises:
        ValueError: a setting is invalid.
    """
    overlap = OVERLAP if overlap is None else overlap
    check_overlap(overlap)
    if tiles is None or (isinstance(tiles, str) and tiles.lower() == NO_TILES):
        return None
    return Tiling(read_tiles(tiles), overlap)


def check_overlap(overlap: float) -> None:
    """Raise ValueError for an overlap that is not in [0, 0.9]."""
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
