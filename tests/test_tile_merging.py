"""Detections of tiles become detections of whole images as soon as all tiles are there."""

import numpy as np
import pytest

from dino_hf.data.tiled_data import cut_into_tiles
from dino_hf.evaluation.tile_merging import TileMerging
from tile_toys import TILES, draw_large

NOTHING = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0)}


@pytest.fixture
def tiled(tmp_path):
    return cut_into_tiles(draw_large(tmp_path / "large", 3), TILES)


def annotated(row) -> dict[str, np.ndarray]:
    """The boxes of a tile as detections."""
    boxes = np.array(row["objects"]["bbox"], dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return {
        "boxes": corners,
        "scores": np.full(len(boxes), 0.9),
        "labels": np.array(row["objects"]["category"], dtype=int),
    }


def test_annotations_of_tiles_merge_to_those_of_the_images(tiled):
    merging = TileMerging(tiled, 300)
    rows = list(tiled.dataset.select_columns(["image_id", "objects"]))
    for row in reversed(rows):  # in any order
        merging.add(row["image_id"], annotated(row))
    assert merging._found == {}  # merged at once
    whole = {row["image_id"]: row for row in merging_source(tiled)}
    merged = dict(merging.take())
    assert merged.keys() == whole.keys()
    for image_id, found in merged.items():
        expected = np.array(whole[image_id]["objects"]["bbox"]).reshape(-1, 4)
        covered = np.array(
            [any(np.abs(box - other).max() < 8 for other in found["boxes"][:, :2]) for box in expected[:, :2]]
        )
        assert len(found["boxes"]) <= len(expected)  # neighbours of one class that overlap may be merged
        assert covered.all()


def merging_source(tiled):
    from dino_hf.data.tiled_data import whole_images

    return whole_images(tiled).dataset.select_columns(["image_id", "objects"])


def test_missing_tiles_do_not_stop_an_evaluation_of_a_part(tiled):
    merging = TileMerging(tiled, 300)
    merging.add(0, NOTHING)  # the whole first image
    merging.add(
        2, NOTHING | {"boxes": np.array([[3.0, 4, 20, 16]]), "scores": np.array([0.5]), "labels": np.array([1])}
    )
    ((image_id, found),) = merging.take()
    x0, y0 = tiled.dataset[2]["tile"][:2]
    assert image_id == 100
    assert found["boxes"].tolist() == [[3 + x0, 4 + y0, 20 + x0, 16 + y0]]
    merging.add(1, NOTHING)
    merging.restart()
    assert list(merging.take()) == []
