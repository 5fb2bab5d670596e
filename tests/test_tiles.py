"""Geometry of tiles: they cover the image and each other, and their sizes are read."""

import itertools

import pytest

from dino_hf.common.tiles import check_overlap, read_tiles, split
from dino_hf.inference.tiling import detect_tiled


@pytest.mark.parametrize(
    ("size", "tile"), [((1500, 1100), (480, 400)), ((640, 3000), (640, 640)), ((1001, 333), (500, 400))]
)
@pytest.mark.parametrize("least", [0.0, 0.2, 0.9])
def test_tiles_cover_the_image_and_each_other(size, tile, least):
    whole, *tiles = split(size, tile, least)
    assert whole == (0, 0, *size)
    sides = {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in tiles}
    assert sides == {tuple(map(min, size, tile))}
    for axis in (0, 1):
        starts = sorted({tile[axis] for tile in tiles})
        side = min(size[axis], tile[axis])
        assert starts[0] == 0
        assert starts[-1] + side == size[axis]
        for before, after in itertools.pairwise(starts):
            assert before + side - after >= least * side - 1  # whole pixels
    counts = [len({tile[axis] for tile in tiles}) for axis in (0, 1)]
    assert len(tiles) == counts[0] * counts[1]
    assert split((640, 512), (640, 512), least) == [(0, 0, 640, 512)]


def test_no_more_tiles_than_needed():
    # 512 apart: 0, 512, 1024 and 1536 reach 2176
    assert len(split((2176, 640), (640, 640), 0.2)) == 1 + 4
    assert len(split((2177, 640), (640, 640), 0.2)) == 1 + 5


def test_sizes_of_tiles_are_read():
    assert read_tiles("640") == (640, 640)
    assert read_tiles("640X480") == (640, 480)
    assert read_tiles(640) == read_tiles((640, 640)) == (640, 640)
    for text in ((0, 640), 12, (1, 2, 3), 64.5, "a", "640x", "640x480x3", "12", "", "-640", "64.5"):
        with pytest.raises(ValueError, match=r"tiles=.* must be a side, or width x height, of at least 32 pixels"):
            read_tiles(text)
    for value in (-0.1, 0.95, float("nan")):
        with pytest.raises(ValueError, match=r"tile_overlap=.* must be in \[0, 0.9\]"):
            check_overlap(value)


def test_the_smallest_tile_and_the_largest_overlap():
    assert read_tiles("32x33") == (32, 33)
    with pytest.raises(ValueError, match="of at least 32 pixels"):
        read_tiles(31)
    check_overlap(0.9)
    with pytest.raises(ValueError, match=r"must be in \[0, 0\.9\]"):
        detect_tiled(lambda images: iter(()), (64, 48), overlap=0.901)
