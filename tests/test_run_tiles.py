"""`train` on tiles: settings of a run, its plan, its results, and a resumed run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dino_hf import DinoDetrImageProcessor
from dino_hf.data import load_data
from dino_hf.data.tiled_data import cut_into_tiles, tiled_images, whole_images
from dino_hf.run.record import RunRecord
from dino_hf.run.tiles import choose_tiles, cut, describe_tiles, tile_warnings, tiles_line
from dino_hf.run.training_run import train
from dino_hf.run.training_view import view_training
from helpers import tiny_config
from tile_toys import TILES, draw_large, write_coco

QUICK = {
    "recipe": "finetune",
    "report_to": "none",
    "use_cpu": True,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "batch_size": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Large images without a held-out part, and a small model without weights."""
    folder = tmp_path_factory.mktemp("run")
    draw_large(folder / "data" / "train", 10, name="_annotations.coco.json")
    tiny_config(num_labels=2, id2label={0: "disc", 1: "box"}).save_pretrained(folder / "untrained")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder / "untrained")
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    return train(folder / "data", model=folder / "untrained", output_dir=folder / "out", tiles="64x48", **QUICK)


def chosen(recorded=None, **settings) -> dict:
    record = RunRecord(Path("out"), recorded or {})
    choose_tiles(record, *(settings.get(name) for name in ("tiles", "tile_overlap", "empty_tiles")))
    return {name: record.values[name] for name in ("tiles", "tile_overlap", "empty_tiles")}


def test_settings_have_defaults_and_are_kept():
    assert chosen() == chosen(tiles="none") == {"tiles": None, "tile_overlap": None, "empty_tiles": None}
    first = {"tiles": "640x480", "tile_overlap": 0.2, "empty_tiles": 1.0}
    assert chosen(tiles=(640, 480)) == chosen(tiles="640x480") == first
    resumed = {"seed": 0} | first
    assert chosen(resumed) == chosen(resumed, tiles="640x480", empty_tiles=1) == first
    assert chosen({"seed": 0}) == chosen({"seed": 0}, tiles="none") == chosen()  # a run of an earlier version


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"tiles": 0}, "tiles=0"),
        ({"tiles": -5}, "tiles=-5"),
        ({"tiles": "abc"}, "tiles='abc'"),
        ({"tiles": 64, "tile_overlap": 1.5}, "tile_overlap=1.5"),
        ({"tiles": 64, "empty_tiles": -1}, "empty_tiles=-1"),
        ({"tile_overlap": 0.3}, "tile_overlap=0.3 needs tiles"),
        ({"empty_tiles": 2.0}, "empty_tiles=2.0 needs tiles"),
    ],
)
def test_invalid_settings(settings, facts):
    with pytest.raises(ValueError, match=facts):
        chosen(**settings)


@pytest.mark.parametrize("settings", [{"tiles": 64}, {"tiles": "none"}, {"tile_overlap": 0.3}, {"empty_tiles": 0.0}])
def test_a_resumed_run_keeps_its_tiles(settings):
    before = {"seed": 0, "tiles": "64x48", "tile_overlap": 0.2, "empty_tiles": 1.0}
    with pytest.raises(ValueError, match=f"started with {next(iter(settings))} "):
        chosen(before, **settings)
    with pytest.raises(ValueError, match="started with tiles not set, not with 64x64"):
        chosen({"seed": 0}, tiles=64)
    with pytest.raises(ValueError, match=r"started with tile_overlap 0, not with 0\.3"):
        chosen(before | {"tile_overlap": 0}, tile_overlap=0.3)


def test_whole_images_are_held_out_before_they_are_cut(folder):
    splits = load_data(folder / "data", validation_fraction=0.3)
    tiled = cut(splits, {"tiles": "64x48", "tile_overlap": 0.2, "empty_tiles": 1.0})
    assert (whole_images(tiled.train), whole_images(tiled.validation)) == (splits.train, splits.validation)
    sources = [set(part.dataset["source_id"]) for part in (tiled.train, tiled.validation)]
    assert not sources[0] & sources[1]
    assert len(sources[0] | sources[1]) == 10
    assert cut(splits, {"tiles": None}) is splits
    assert cut(splits, {}) is splits


def test_the_plan_describes_tiles(folder):
    data = load_data(folder / "data", validation_fraction=0.0).train
    tiled = cut_into_tiles(data, TILES)
    counts, tiles = tiled_images(tiled).counts, describe_tiles(tiled, None, None)
    assert (tiles["tiles"], tiles["tiles_without_boxes"], tiles["images_cut"]) == (
        counts.tiles,
        counts.empty,
        counts.cut,
    )
    assert tiles["per_epoch"] <= len(tiled.dataset)
    assert tiles["memory"] == 3 * sum(
        width * height for width, height in tiled_images(tiled).sizes.tolist() if width > 64
    )
    line = tiles_line(tiles, 10)
    assert f"{counts.cut} of 10 training images are cut into {counts.tiles} tiles" in line
    assert describe_tiles(data, None, None) is None
    assert tile_warnings(data, None) == []


def warnings_of(folder, boxes, size=(640, 480), tiles=TILES):
    Image.new("RGB", size).save(folder / "one.png")
    data = cut_into_tiles(write_coco(folder, [(7, "one.png", size, boxes)]), tiles)
    return " ".join(tile_warnings(data, SimpleNamespace(size={"shortest_edge": 48})))


def test_tiles_that_do_not_fit_are_warned_of(tmp_path):
    usual = [(3, 40 * place, 30 * place, 20, 16) for place in range(10)]
    assert warnings_of(tmp_path, usual) == ""
    assert "no training image is larger than a tile" in warnings_of(tmp_path, usual, tiles=640)
    assert "1 of 11 boxes are in no tile" in warnings_of(tmp_path, [*usual, (3, 50, 40, 500, 400)])
    assert "1 of 11 boxes are not trained on" in warnings_of(tmp_path, [*usual, (3, 10, 2, 600, 0.4)])
    assert "sides below 5.0 pixels" in warnings_of(tmp_path, [(3, x, x, 5, 5) for x in range(50, 99)])
    assert "sides above 40 pixels" in warnings_of(
        tmp_path, [(3, 40 * place, 30 * place, 40, 40) for place in range(10)]
    )


def test_a_run_on_tiles_leaves_what_prediction_needs(finished):
    folder = finished.output_dir
    assert finished.preflight.data["images"] == {"train": 8, "validation": 2, "test": None}
    assert finished.preflight.data["tiles"]["size"] == [64, 48]
    results = json.loads((folder / "results.json").read_text())
    assert results["tiles"] == {"size": [64, 48], "overlap": 0.2}
    assert results["counts"]["images"] == 2
    assert "64 x 48 pixels" in (folder / "README.md").read_text()
    training = json.loads((folder / "config.json").read_text())["provenance"]["training"]
    assert training["tiles"]["size"] == [64, 48]
    assert (training["num_images"], training["evaluation"]["num_images"]) == (8, 2)
    run = json.loads((folder / "run.json").read_text())
    assert (run["tiles"], run["tile_overlap"], run["empty_tiles"]) == ("64x48", 0.2, 1.0)


def test_the_pictures_of_a_run_show_its_tiles(finished, folder):
    assert tiled_images(view_training(finished.output_dir).data).tiling.size == (64, 48)
    assert tiled_images(view_training(folder / "data", tiles=100, tile_overlap=0.5).data).tiling == ((100, 100), 0.5)
    assert tiled_images(view_training(folder / "data").data) is None
    assert tiled_images(view_training(finished.output_dir, tiles="none").data) is None
    assert tiled_images(view_training(finished.output_dir, tile_overlap=0.5).data).tiling == ((64, 48), 0.5)
