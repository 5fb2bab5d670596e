"""Order of tiles: each is drawn as often as its factor says, and large images are seldom read."""

import itertools
from collections import Counter

import numpy as np
import pytest

from dino_hf.data.tiled_data import cut_into_tiles, drawing_factors
from dino_hf.training import RepeatFactorSampler
from dino_hf.training.class_balance import images_per_epoch, sampling_factors
from dino_hf.training.tile_sampler import TileSampler, make_sampler
from tile_toys import TILES, draw_large


def sampler_of(counts, pixels, seed=0, factors=None):
    images = np.repeat(np.arange(len(counts)), counts)
    return TileSampler(np.ones(len(images)) if factors is None else factors, images, np.array(pixels)[images], seed)


def test_each_tile_comes_once_in_an_order_of_its_epoch():
    sampler = sampler_of([70, 1, 200, 5], [2**25, 0, 2**26, 2**24])
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(276))
    assert orders[0] == orders[2] != orders[1]
    assert list(sampler_of([70, 1, 200, 5], [2**25, 0, 2**26, 2**24], seed=1)) != orders[0]
    assert len(sampler) == 276


def test_large_images_come_in_groups_of_64():
    """Two images do not fit into memory together, so their groups alternate."""
    sampler = sampler_of([200, 200, 200], [2**26] * 3)
    order = sampler.images[list(sampler)]
    lengths = [len(list(group)) for _, group in itertools.groupby(order)]
    assert sum(lengths) == 600
    assert max(Counter(lengths), key=Counter(lengths).get) == 64
    assert len(lengths) <= 12  # 4 groups of each image; neighbours may be of the same image


def test_images_that_fit_together_are_mixed():
    order = sampler_of([40] * 6, [2**20] * 6)
    images = order.images[list(order)]
    changes = (np.diff(images) != 0).sum()
    assert changes > 0.7 * len(images)  # 5 of 6 in a random order


@pytest.mark.parametrize("kept", [1000, 30_000, 10**9])
def test_images_are_decoded_as_seldom_as_the_memory_allows(tmp_path, monkeypatch, kept):
    monkeypatch.setattr("dino_hf.data.tiled_data.KEPT_PIXELS", kept)
    monkeypatch.setattr("dino_hf.training.tile_sampler.KEPT_PIXELS", kept)
    tiled = cut_into_tiles(draw_large(tmp_path / "large", 8), TILES, empty_tiles=1000)
    images = tiled.dataset.features["image"].images
    decoded, decode = [], images._decode
    monkeypatch.setattr(images, "_decode", lambda row, size: decoded.append(row) or decode(row, size))
    for index in make_sampler(tiled, None, 3):
        assert tiled.dataset[index]["image"] is not None
    assert Counter(decoded) == dict.fromkeys(range(8), 1)


def test_factors_of_tiles_and_of_rare_classes_are_multiplied(tmp_path):
    data = draw_large(tmp_path / "large", 8)
    tiled = cut_into_tiles(data, TILES, empty_tiles=0.5)
    drawn, repeated = drawing_factors(tiled), sampling_factors(tiled, 0.9)
    has_boxes = np.array([bool(row["bbox"]) for row in tiled.dataset["objects"]])
    np.testing.assert_array_equal(repeated[~has_boxes], drawn[~has_boxes])
    assert (repeated[has_boxes] > 1).any()
    assert images_per_epoch(tiled, None) == len(make_sampler(tiled, None, 0)) < len(tiled.dataset)
    assert images_per_epoch(data, None) == 8
    assert make_sampler(data, None, 0) is None
    assert type(make_sampler(data, 0.9, 0)) is RepeatFactorSampler
    assert isinstance(make_sampler(tiled, 0.9, 0), TileSampler)
