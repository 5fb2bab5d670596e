"""Tiles of a data set: boxes are cut by one rule, images are cut when they are read, and are not decoded for each tile."""

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from dino_hf.common.tiles import split
from dino_hf.data.rows import ImageSizeError
from dino_hf.data.tiled_data import (
    cut_into_tiles,
    drawing_factors,
    id_name,
    row_name,
    tiled_images,
    whole_images,
)
from tile_toys import TILES, draw_large, write_coco


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_large(tmp_path_factory.mktemp("large"), 8)


@pytest.fixture(scope="module")
def tiled(data):
    return cut_into_tiles(data, TILES)


def one_image(folder, size, boxes, tiles=TILES, **settings):
    """The rows of one grey image."""
    Image.new("RGB", size, (90, 80, 70)).save(folder / "one.png")
    data = write_coco(folder, [(7, "one.png", size, boxes)])
    return cut_into_tiles(data, tiles, **settings)


def boxes_by_tile(tiled) -> dict[tuple, list]:
    rows = tiled.dataset.select_columns(["tile", "objects"])
    return {tuple(row["tile"]): row["objects"]["bbox"] for row in rows}


def test_rows_are_the_views_of_prediction(data, tiled):
    expected = [
        (image_id, tile)
        for image_id, width, height in zip(
            *(data.dataset[name] for name in ("image_id", "width", "height")), strict=True
        )
        for tile in split((width, height), TILES, 0.2)
    ]
    assert [
        (row["source_id"], tuple(row["tile"])) for row in tiled.dataset.select_columns(["source_id", "tile"])
    ] == expected
    assert list(tiled.dataset["image_id"]) == list(range(len(expected)))
    assert len({source for source, _ in expected}) == len(data.dataset) < len(expected)
    assert (tiled.id2label, tiled.category_ids, tiled.name) == (data.id2label, data.category_ids, data.name)
    assert whole_images(tiled) is data
    assert whole_images(data) is data


def test_each_row_has_the_pixels_of_its_tile(data, tiled):
    whole = {row["image_id"]: np.asarray(row["image"]) for row in data.dataset}
    for row in tiled.dataset:
        x0, y0, x1, y1 = row["tile"]
        assert row["image"].mode == "RGB"
        assert row["image"].size == (row["width"], row["height"]) == (x1 - x0, y1 - y0)
        np.testing.assert_array_equal(np.asarray(row["image"]), whole[row["source_id"]][y0:y1, x0:x1])


def test_boxes_of_bright_rectangles_are_at_bright_pixels(data, tiled):
    num_boxes = 0
    for row in tiled.dataset:
        pixels = np.asarray(row["image"])
        for x, y, width, height in np.array(row["objects"]["bbox"], dtype=int).reshape(-1, 4):
            assert (pixels[y : y + height, x : x + width] == 250).all()
            num_boxes += 1
        np.testing.assert_allclose([box[2] * box[3] for box in row["objects"]["bbox"]], row["objects"]["area"])
    assert num_boxes > sum(len(row["objects"]["bbox"]) for row in data.dataset)


def test_a_tile_keeps_a_box_that_it_shows_by_half(tmp_path):
    """Tiles of 64 pixels begin at 0, 48 and 96: the first ends at 64."""
    half, less = (3, 54, 5, 20, 10), (8, 54.1, 20, 20, 10)
    found = boxes_by_tile(one_image(tmp_path, (160, 40), [half, less]))
    assert list(found) == [(0, 0, 160, 40), (0, 0, 64, 40), (48, 0, 112, 40), (96, 0, 160, 40)]
    assert found[0, 0, 64, 40] == [[54, 5, 10, 10]]
    np.testing.assert_allclose(found[48, 0, 112, 40], [[6, 5, 20, 10], [6.1, 20, 20, 10]])
    assert found[96, 0, 160, 40] == []
    assert found[0, 0, 160, 40] == [[54, 5, 20, 10], [54.1, 20, 20, 10]]  # as annotated


def test_the_share_is_of_what_the_image_shows(tmp_path):
    """Of a box that sticks out of its image by 30 pixels, 12 are visible, 8 of them in the second tile from the left."""
    found = boxes_by_tile(one_image(tmp_path, (100, 40), [(3, 88, 5, 42, 10)], overlap=0.0))
    assert found[0, 0, 100, 40] == [[88, 5, 42, 10]]
    assert found[36, 0, 100, 40] == [[52, 5, 12, 10]]
    assert found[0, 0, 64, 40] == []


def test_neighbours_that_overlap_by_one_pixel(tmp_path):
    tiled = one_image(tmp_path, (127, 40), [(3, 63, 5, 1, 10), (8, 62, 20, 3, 6)], overlap=1 / 64)
    found = boxes_by_tile(tiled)
    assert list(found)[1:] == [(0, 0, 64, 40), (63, 0, 127, 40)]
    assert found[0, 0, 64, 40] == [[63, 5, 1, 10], [62, 20, 2, 6]]
    assert found[63, 0, 127, 40] == [[0, 5, 1, 10], [0, 20, 2, 6]]
    np.testing.assert_allclose(tiled.dataset[1]["objects"]["area"], [10, 12])


def test_crowds_are_cut_to_every_tile_that_shows_them(tmp_path):
    tiled = one_image(tmp_path, (160, 40), [(3, 10, 5, 140, 10, "crowd"), (8, 10, 20, 140, 10)])
    for row in list(tiled.dataset)[1:]:
        assert row["objects"]["iscrowd"] == [1]  # no tile shows half of the box
        x0 = row["tile"][0]
        assert row["objects"]["bbox"] == [[max(10 - x0, 0), 5, min(150 - x0, 64) - max(10 - x0, 0), 10]]
        np.testing.assert_allclose(row["objects"]["area"], [row["objects"]["bbox"][0][2] * 10])
    counts = tiled_images(tiled).counts
    assert (counts.boxes, counts.only_in_whole, counts.lost) == (1, 1, 0)
    assert counts.empty == counts.tiles == 3  # crowds are not trained on


def test_the_whole_image_drops_boxes_that_are_too_small(tmp_path):
    """The image has 25 times the area of a tile, so 4 x 4 pixels of a tile are 20 x 20 pixels of the image."""
    tiled = one_image(tmp_path, (320, 240), [(3, 8, 8, 20, 20), (8, 8, 40, 20, 19.9), (3, 100, 8, 20, 19.9, "crowd")])
    whole, *tiles = boxes_by_tile(tiled).values()
    assert whole == [[8, 8, 20, 20], [100, 8, 20, 19.9]]
    assert tiles[0][0] == [8, 8, 20, 20]
    assert tiled_images(tiled).counts.lost == 0


def test_counts(data, tiled):
    counts = tiled_images(tiled).counts
    rows = list(tiled.dataset.select_columns(["source_id", "tile", "objects"]))
    sizes = {row["image_id"]: (row["width"], row["height"]) for row in data.dataset}
    is_whole = [sizes[row["source_id"]] == tuple(row["tile"][2:]) and row["tile"][:2] == [0, 0] for row in rows]
    assert counts.images == sum(is_whole) == 8
    assert counts.cut == 6
    assert counts.tiles == len(rows) - 8
    assert counts.empty == sum(
        not whole and not row["objects"]["bbox"] for whole, row in zip(is_whole, rows, strict=True)
    )
    assert counts.boxes == sum(len(row["objects"]["bbox"]) for row in data.dataset)
    assert counts.only_in_whole == counts.lost == 0


@pytest.mark.parametrize("empty_tiles", [0, 0.25, 1, 1000])
def test_empty_tiles_share_their_draws(data, empty_tiles):
    tiled = cut_into_tiles(data, TILES, empty_tiles=empty_tiles)
    factors, counts = drawing_factors(tiled), tiled_images(tiled).counts
    has_boxes = np.array([bool(row["bbox"]) for row in tiled.dataset["objects"]])
    assert (factors[has_boxes] == 1).all()
    assert factors.sum() == pytest.approx(
        len(factors) - counts.empty + min(counts.empty, empty_tiles * has_boxes.sum())
    )
    images = tiled_images(tiled)
    is_whole = [
        (row["width"], row["height"]) == tuple(images.sizes[list(data.dataset["image_id"]).index(row["source_id"])])
        for row in tiled.dataset.select_columns(["width", "height", "source_id"])
    ]
    assert (factors[np.array(is_whole)] == 1).all()  # also of images without boxes
    assert sum(is_whole) == 8
    assert drawing_factors(data) is None


def test_nothing_is_cut_if_no_image_is_larger_than_a_tile(data):
    tiled = cut_into_tiles(data, "180x130")
    assert tiled_images(tiled).counts[:3] == (8, 0, 0)
    assert len(tiled.dataset) == 8
    for name in ("objects", "width", "height", "file_name"):
        assert list(tiled.dataset[name]) == list(data.dataset[name])
    assert (drawing_factors(tiled) == 1).all()


def test_an_image_is_decoded_once_for_its_tiles(data, monkeypatch):
    tiled, decoded = cut_into_tiles(data, TILES), []
    images = tiled_images(tiled)
    decode = images._decode
    monkeypatch.setattr(images, "_decode", lambda row, size: decoded.append(row) or decode(row, size))
    rows = tiled.dataset.with_transform(lambda rows: rows)
    for index in range(len(rows)):
        rows[index]
    assert decoded == list(range(8))
    rows[0]
    assert decoded == list(range(8))  # still in memory


def test_images_are_dropped_from_memory_before_others_are_read(data, monkeypatch):
    monkeypatch.setattr("dino_hf.data.tiled_data.KEPT_PIXELS", 20_000)
    tiled = cut_into_tiles(data, TILES)
    images, most = tiled_images(tiled), 0
    guarded = []
    images.guard = lambda pixels: guarded.append(pixels) or nullcontext()
    for row in tiled.dataset:
        assert row["image"].size == (row["width"], row["height"])
        most = max(most, sum(image.size for image in images._kept.values()))
    assert len(images._kept) >= 1
    assert most <= 3 * max(20_000, max(images.sizes.prod(1)))
    assert guarded == [size.prod() for size in images.sizes if (size > TILES).any()]


def test_copies_and_workers_share_the_images(tiled):
    images = tiled_images(tiled)
    for dataset in (
        tiled.dataset.select([3, 1]),
        tiled.dataset.with_transform(lambda rows: rows),
        copy.deepcopy(tiled.dataset),
    ):
        assert tiled_images(tiled._replace(dataset=dataset)) is images
    again = pickle.loads(pickle.dumps(tiled))
    assert tiled_images(again)._kept == {}
    np.testing.assert_array_equal(np.asarray(again.dataset[4]["image"]), np.asarray(tiled.dataset[4]["image"]))


def test_rows_are_named_by_image_and_tile(data, tiled):
    place = next(index for index, row in enumerate(tiled.dataset) if row["source_id"] == 107 and row["tile"][0] > 0)
    x0, y0, x1, y1 = tiled.dataset[place]["tile"]
    text = f"107 (tile from {x0}, {y0} to {x1}, {y1})"
    assert id_name(tiled, place) == text
    assert id_name(tiled._replace(dataset=tiled.dataset.select([0, place])), place) == text
    assert id_name(data, 107) == row_name(107) == "107"


def test_images_of_other_kinds_are_cut_as_they_are_read(tmp_path):
    """An image turned by EXIF, a palette image and 16 bits of grey."""
    rng = np.random.default_rng(1)
    stored = Image.fromarray(rng.integers(0, 255, (150, 90, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right by 90 degrees
    stored.save(tmp_path / "turned.png", exif=exif)
    stored.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    Image.fromarray(rng.integers(0, 65535, (90, 150), dtype=np.uint16)).save(tmp_path / "deep.png")
    data = write_coco(
        tmp_path,
        [
            (1, "turned.png", (150, 90), [(3, 100, 50, 20, 16)]),
            (2, "palette.png", (90, 150), [(8, 50, 100, 16, 20)]),
            (5, "deep.png", (150, 90), []),
        ],
    )
    whole = {row["image_id"]: np.asarray(row["image"]) for row in data.dataset}
    tiled = cut_into_tiles(data, TILES)
    assert len(tiled.dataset) > 20
    for row in tiled.dataset:
        x0, y0, x1, y1 = row["tile"]
        np.testing.assert_array_equal(np.asarray(row["image"]), whole[row["source_id"]][y0:y1, x0:x1])


def test_an_image_of_another_size_is_refused_by_its_own_id(tmp_path):
    Image.new("RGB", (150, 90)).save(tmp_path / "a.png")
    data = write_coco(tmp_path, [(41, "a.png", (151, 90), [(3, 10, 10, 9, 8)])])
    tiled = cut_into_tiles(data, TILES)
    with pytest.raises(ImageSizeError, match="Image 41 is 150 wide"):
        tiled.dataset[1]


@pytest.mark.parametrize("tiles", [0, -5, "abc", "none", None, (64, 48, 3), 31])
def test_invalid_sizes(data, tiles):
    with pytest.raises(ValueError, match="of at least 32 pixels"):
        cut_into_tiles(data, tiles)


def test_other_invalid_settings(data, tiled):
    with pytest.raises(ValueError, match=r"tile_overlap=1 "):
        cut_into_tiles(data, 64, 1)
    for value in (-0.1, "all", float("nan"), True):
        with pytest.raises(ValueError, match="empty_tiles="):
            cut_into_tiles(data, 64, empty_tiles=value)
    with pytest.raises(ValueError, match="already"):
        cut_into_tiles(tiled, 64)
    columns = {"width": [None] * 8, "height": [None] * 8}
    without = data.dataset.remove_columns(["width", "height"]).with_format(None)
    for name, values in columns.items():
        without = without.add_column(name, values, feature=data.dataset.features[name])
    with pytest.raises(ValueError, match="Image 100 has no width"):
        cut_into_tiles(data._replace(dataset=without), 64)
