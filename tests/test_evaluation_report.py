"""A report is complete or not there, for any number of classes and for a model that finds nothing."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dino_hf.evaluation import compare, evaluate_model, plots, save_report
from dino_hf.evaluation.report import COMPARISON_FILES, FILES, check_folder, save_comparison
from dino_hf.model.coco_classes import COCO_CLASSES
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
    with pytest.raises(
        FileExistsError, match="has an evaluation in it; choose another folder, or replace it with --over"
    ):
        check_folder(folder)
    check_folder(folder, overwrite=True)
    check_folder(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "detections.json").write_text("[]")
    for content in ("[]", '{"mine": 1}', "[" * 10**5):
        (tmp_path / "results.json").write_text(content)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="has files that are not of an evaluation; choose a new or empty"):
                check_folder(tmp_path, overwrite)
    with pytest.raises(OSError, match=r"results\.json is not a folder; choose another place"):
        check_folder(tmp_path / "results.json")
    if Path("/proc/self").exists():  # where not even root can write
        with pytest.raises(OSError, match=r"/proc/self/out cannot be written .*; choose another place"):
            check_folder(Path("/proc/self/out"))


def test_a_new_report_leaves_nothing_of_an_earlier_comparison(data, evaluation, tmp_path):
    save_report(evaluation, data, tmp_path / "compared")
    for name in (*COMPARISON_FILES, "mine.txt"):
        (tmp_path / name).write_text("old")
    save_report(evaluation, data, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "mine.txt"}


def test_pictures_of_many_classes_are_bounded_and_say_what_they_leave_out(tmp_path, monkeypatch):
    names = [f"class number {number} with a long name" for number in range(300)]
    data = draw_blocks(tmp_path / "blocks", names, 12)
    predictor = ReadyPredictor(data.id2label, noisy_answers(data))
    evaluation = evaluate_model(predictor, data, num_bootstrap=40)
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, **style: titles.append(title))
    monkeypatch.setattr(Figure, "suptitle", lambda figure, title, **style: titles.append(title))
    for name in ("confusion", "ap_per_class", "precision_recall", "f1"):
        getattr(plots, f"save_{name}")(tmp_path / f"{name}.png", evaluation)
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert max(picture.size) <= 3000
    assert "the 50 classes with the most mistakes; 250 are left out" in titles[0]
    assert "200 in between are left out" in titles[1]
    plots.save_comparison_plot(tmp_path / "compare.png", compare(evaluation, evaluation))
    with Image.open(tmp_path / "compare.png") as picture:
        assert max(picture.size) <= 3000
    confusion = evaluation.as_dict()["confusion"]
    assert sum(count for *_, count in confusion["cells"]) == evaluation.confusion.sum()
    assert len(confusion["cells"]) < 1000


@pytest.mark.parametrize(("num_classes", "drawn"), [(100, 100), (101, 50)])
def test_the_confusion_matrix_is_whole_up_to_a_hundred_classes(num_classes, drawn):
    confusion = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    confusion[np.arange(num_classes), np.arange(num_classes)] = 10**6  # right answers are no mistakes
    confusion[-3, 4] = confusion[7, -1] = confusion[-1, 9] = 5
    evaluation = SimpleNamespace(confusion=confusion, class_names=dict.fromkeys(range(num_classes), "x"))
    counts, names, left_out = plots._most_confused(evaluation)
    assert (counts.shape, len(names), left_out) == ((drawn + 1,) * 2, drawn, num_classes - drawn)
    mistakes = counts.sum() - counts.diagonal().sum()
    assert mistakes == 15  # all are shown


def test_numbers_can_be_read_on_every_blue():
    def luminance(colour):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for share in np.linspace(0, 1, 51):
        behind = luminance(plots._BLUES(share)) + 0.05
        contrast = 1.05 / behind if plots.readable_on(plots._BLUES(share)) == "white" else behind / 0.05
        assert contrast >= 4.5  # what WCAG asks for


def test_an_evaluation_in_a_notebook_is_a_line(evaluation):
    assert re.fullmatch(
        r"Evaluation\('.*' on \d+ images, \d+ objects, \d+ classes: AP 0.\d+, AP50 0.\d+\)", repr(evaluation)
    )
