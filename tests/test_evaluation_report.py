"""A report is complete or not there, for any number of classes and for a model that finds nothing."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from dino_hf.coco_classes import COCO_CLASSES
from dino_hf.evaluation import compare, evaluate_model, plots, save_report
from dino_hf.evaluation.report import COMPARISON_FILES, FILES, check_folder, save_comparison
from evaluation_toys import ReadyPredictor, draw_blocks, noisy_answers

FORMULA = r"猫 $\frac$"  # it does not parse, and the font that matplotlib brings does not have it


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_blocks(
        tmp_path_factory.mktemp("data") / "blocks",
        [FORMULA, "a name longer than there is room", "unused"],
        12,
        unused=1,
    )


@pytest.fixture(scope="module")
def evaluation(data):
    return evaluate_model(ReadyPredictor(data.id2label, noisy_answers(data)), data, num_bootstrap=40)


@pytest.fixture(scope="module")
def folder(data, evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new" / "out"
    assert save_report(evaluation, data, folder) == [folder / name for name in FILES]
    return folder


def num_colours(path):
    return len(Image.open(path).convert("RGB").getcolors(2**24))


def test_every_file_is_there_and_nothing_else(folder):
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert all(num_colours(path) > 20 for path in folder.glob("*.png"))


def test_the_json_has_the_numbers_and_where_they_come_from(folder, evaluation):
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["metrics"]["AP50"] == evaluation.metrics["AP50"]
    assert content["intervals_95"]["AP"] == list(evaluation.intervals["AP"])
    assert content["best_threshold"]["threshold"] == evaluation.best_threshold
    assert content["dataset"] == "blocks/annotations.json"
    assert content["bootstrap"] == {"resamples": 40, "seed": 0}
    assert {"dino_hf", "torch", "transformers", "pycocotools"} <= set(content["versions"])
    assert json.loads((folder / "detections.json").read_text()) == evaluation.detections


def test_the_table_has_a_row_for_all_and_one_for_each_class(folder, evaluation):
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["all", FORMULA, "a name longer than there is room", "unused"]
    assert float(rows[0]["AP"]) == evaluation.metrics["AP"]
    assert float(rows[0]["AP_low"]) == evaluation.intervals["AP"][0]
    assert float(rows[1]["AP50_high"]) == evaluation.per_class[0]["intervals"]["AP50"][1]
    assert (rows[3]["AP"], rows[3]["AP_low"], rows[3]["num_objects"]) == ("none", "", "0")


def test_what_fails_leaves_the_earlier_report(folder, data, evaluation, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(path, evaluation):
        path.write_text("half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(plots, "save_f1", fail)
    changed = evaluate_model(ReadyPredictor(data.id2label, noisy_answers(data, seed=5)), data, num_bootstrap=0)
    with pytest.raises(OSError, match="No space left"):
        save_report(changed, data, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("num_classes", [1, 80])
def test_a_comparison_and_many_classes_are_drawn(tmp_path, num_classes):
    names = list(COCO_CLASSES.values())[:num_classes]
    data = draw_blocks(tmp_path / "blocks", names, 8)
    pair = [
        evaluate_model(ReadyPredictor(data.id2label, noisy_answers(data, seed)), data, num_bootstrap=40)
        for seed in (0, 1)
    ]
    for name in ("precision_recall", "f1", "confusion", "ap_per_class"):
        path = tmp_path / f"{name}.png"
        getattr(plots, f"save_{name}")(path, pair[0])
        assert num_colours(path) > 20
    paths = save_comparison(compare(*pair), tmp_path / "out")
    assert [path.name for path in paths] == list(COMPARISON_FILES)
    assert json.loads(paths[0].read_text())["verdict"] == compare(*pair).verdict
    assert num_colours(paths[1]) > 20


def test_a_model_that_finds_nothing_has_a_report(data, tmp_path):
    nothing = {row["image"].tobytes(): ([], [], []) for row in data.dataset}
    found = evaluate_model(ReadyPredictor(data.id2label, nothing), data, num_bootstrap=40)
    assert len(save_report(found, data, tmp_path)) == len(FILES)
    assert json.loads((tmp_path / "results.json").read_text())["best_threshold"] is None


def test_files_of_others_are_not_replaced(folder, tmp_path):
    check_folder(folder)
    check_folder(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "detections.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"has a file detections.json that no evaluation has written, .* choose another"
    ):
        check_folder(tmp_path)
    (tmp_path / "results.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"has a file results\.json"):
        check_folder(tmp_path)
    with pytest.raises(OSError, match=r"results\.json cannot be written, Not a directory; choose another folder"):
        check_folder(tmp_path / "results.json")
    if Path("/proc/self").exists():  # where not even root can write
        with pytest.raises(OSError, match=r"/proc/self/out cannot be written, .*; choose another folder"):
            check_folder(Path("/proc/self/out"))
