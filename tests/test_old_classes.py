"""Runs that keep the classes of the old detector: boxes, weights, resume, report. See test_kept_classes.py for the functions."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.data import load_data
from dino_hf.evaluation import report
from dino_hf.inference import Predictor
from dino_hf.run.old_class_report import summary_lines
from dino_hf.run.old_classes import FILE_NAME, MIN_SCORE, OldClasses, find_old_classes
from dino_hf.run.record import RunRecord
from dino_hf.run.training_run import train
from dino_hf.training import kept_classes
from helpers import tiny_config
from processes import run_processes

QUICK = {"report_to": "none", "use_cpu": True, "num_denoising": 5, "learning_rate": 1e-3, "ema_decay": 0.9}
QUICK |= {"ema_warmup_steps": 0, "num_train_epochs": 2, "num_queries": 15}
OLD, NEW = ["disc", "box", "triangle"], ["star", "ring"]


def write_scenes(folder: Path, num_images: int, seed: int, names: list[str], **renamed: str) -> None:
    """Scenes annotated only with some classes, which may get other names."""
    path = make_scenes(folder, num_images, seed=seed)
    content = json.loads(path.read_text())
    ids = [category_id for category_id, name in CATEGORIES.items() if name in names]
    content["categories"] = [{"id": one, "name": renamed.get(CATEGORIES[one], CATEGORIES[one])} for one in ids]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] in ids]
    path.write_text(json.dumps(content))


def save_detector(folder: Path, names: list[str], bias: float = 0.2) -> None:
    """A detector with random weights that detects something everywhere, unless its bias is low."""
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(
        tiny_config(num_denoising=5, num_labels=len(names), id2label=dict(enumerate(names)), category_ids=[21, 5, 7])
    )
    with torch.no_grad():
        for head in (model.model.query_selection.head, *model.model.decoder.heads):
            head.class_head.weight.normal_(std=0.5)
            head.class_head.bias.fill_(bias)
    model.save_pretrained(folder)
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keep")
    for name, num_images, seed in (("train", 10, 0), ("validation", 6, 1)):
        write_scenes(folder / "data" / name, num_images, seed, NEW)
    write_scenes(folder / "old_data" / "validation", 9, 5, ["disc", "box", "ring"])
    save_detector(folder / "old", OLD)
    return folder


def run_quietly(*args, **settings):
    """The run, and what it printed, in one line."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run = train(*args, **settings)
    return run, " ".join(output.getvalue().split())


@pytest.fixture(scope="module")
def finished(folder):
    return run_quietly(folder / "data", model=folder / "old", keep_classes=True, output_dir=folder / "out", **QUICK)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_detector_has_old_and_new_classes(finished):
    run, printed = finished
    config = read_json(run.output_dir / "config.json")
    assert list(config["id2label"].values()) == [*OLD, *NEW]
    assert config["category_ids"] == [21, 5, 7, 41, 40]  # 21 of "star" belongs to "disc"
    assert "Kept 3 of 5 classes: disc, box, triangle" in printed
    assert "New category ids, because old classes have theirs: star 41" in printed


def test_boxes_of_the_old_detector_are_trained_on_and_told(finished, folder):
    run, printed = finished
    old = OldClasses.read(run.output_dir)
    data = load_data(folder / "data")
    predictor = Predictor(folder / "old", device="cpu")
    for name in ("train", "validation"):
        part = getattr(data, name)
        assert set(old.boxes[name]) == set(part.dataset["image_id"])
        for row in part.dataset:
            found = next(predictor([row["image"]]))
            kept = found.keep(found.scores > MIN_SCORE)
            for label, (x, y, width, height), score in old.boxes[name][row["image_id"]]:
                assert 0 <= x < x + width <= row["width"]
                assert 0 <= y < y + height <= row["height"]
                place = abs(kept.scores - score).argmin()
                assert abs(kept.scores[place] - score) < 1e-5  # batches round differently
                assert kept.labels[place] == label
    counts = {name: sum(len(entries) for entries in images.values()) for name, images in old.boxes.items()}
    assert counts["train"] > 0
    assert f"boxes in training, {counts['validation']} in held-out images" in printed
    trained = run.trainer.train_dataset
    num_boxes = sum(len(trained[index]["labels"]["class_labels"]) for index in range(len(trained)))
    assert num_boxes > counts["train"] / 2  # crops may lose some
    classes = run.preflight.data["classes"]
    assert sum(classes[name] for name in OLD) == counts["train"]


def test_a_detector_may_have_its_own_thresholds(folder, tmp_path):
    save_detector(tmp_path / "old", OLD)
    path = tmp_path / "old/config.json"
    path.write_text(json.dumps(read_json(path) | {"score_threshold": 0.6, "class_score_thresholds": {"disc": 0.9}}))
    record = RunRecord(tmp_path / "out", {})
    record.values["model"] = str(tmp_path / "old")
    old = find_old_classes(record, load_data(folder / "data"), True, Console())
    assert old.min_scores == {"disc": 0.9, "box": 0.6, "triangle": 0.6}
    added = [entry for images in old.boxes.values() for entries in images.values() for entry in entries]
    assert len(added) > 10
    assert all(score > old.min_scores[OLD[label]] for label, _, score in added)
    assert "above 0.6 to 0.9, by class" in " ".join(old.notes())


def test_weights_are_chosen_by_old_and_new_classes(finished):
    run, printed = finished
    groups = kept_classes.ClassGroups(OLD, NEW)
    entries = [entry for entry in run.trainer.state.log_history if "eval_AP" in entry]
    assert len(entries) == 2
    best = max(entries, key=lambda entry: max(groups.balanced_ap(entry, prefix) for prefix in ("eval_", "eval_ema_")))
    assert f"after step {best['step']}, the best of 2 evaluations by the mean of the AP of old classes" in printed


def test_the_report_tells_agreement_from_ap(finished):
    run, printed = finished
    result = read_json(run.output_dir / "results.json")
    assert {row["name"] for row in result["per_class"]} == set(NEW)  # held-out AP is about annotated classes alone
    old = result["old_classes"]
    assert old["is_agreement"]
    assert old["classes"] == OLD
    assert (old["num_images"], old["before"]) == (6, {})
    assert 0 <= old["metrics"]["AP"] <= 1
    assert f"agreement {old['metrics']['AP']:.3f} with the old detector on 6 held-out images" in printed
    card = (run.output_dir / "README.md").read_text(encoding="utf-8")
    assert f"**agreement {old['metrics']['AP']:.3f}**" in card
    assert "not an AP on annotations" in card


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_resumed_run_has_the_same_boxes(finished, folder, tmp_path, monkeypatch, has_checkpoint):
    """The old detector is not asked again: here it has been replaced."""
    copy = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    record = read_json(copy / "run.json")
    del record["finished"], record["weights"]
    record["model"] = str(tmp_path / "old")
    (copy / "run.json").write_text(json.dumps(record))
    shutil.copytree(folder / "old", tmp_path / "old")
    if has_checkpoint:
        save_detector(tmp_path / "old", OLD, bias=-99.0)
    shutil.rmtree(copy / "checkpoint-4")
    if not has_checkpoint:
        shutil.rmtree(copy / "checkpoint-2")
    monkeypatch.setattr(report, "save_report", lambda *args: [])  # drawing takes seconds
    run, _ = run_quietly(folder / "data", output_dir=copy, resume=True)
    assert run.trainer.state.global_step == 4
    for name in ("model.safetensors", "last/model.safetensors"):
        one, other = load_file(copy / name), load_file(finished[0].output_dir / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_resumed_run_needs_its_boxes(finished, folder, tmp_path):
    copy = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    (copy / FILE_NAME).write_text('{"classes": {}}')
    with pytest.raises(ValueError, match=rf"{FILE_NAME} is damaged"):
        run_quietly(folder / "data", output_dir=copy, resume=True)
    (copy / FILE_NAME).unlink()
    with pytest.raises(ValueError, match=rf"has no {FILE_NAME}"):
        run_quietly(folder / "data", output_dir=copy, resume=True)


def test_a_run_cannot_begin_to_keep_classes_when_it_is_resumed(finished, folder, tmp_path):
    copy = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    record = read_json(copy / "run.json") | {"keep_classes": None}
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="started with keep_classes not set, not with True"):
        run_quietly(folder / "data", output_dir=copy, resume=True, keep_classes=True)


def test_old_data_give_the_ap_before_and_after(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "save_report", lambda *args: [])
    run, printed = run_quietly(
        folder / "data",
        model=folder / "old",
        keep_classes=True,
        old_data=folder / "old_data",
        output_dir=tmp_path / "out",
        **QUICK | {"num_train_epochs": 1},
    )
    old = run.evaluation.old_classes
    assert not old["is_agreement"]
    assert old["num_images"] == 9
    assert {"AP", "AP_class_disc", "AP_class_box"} <= set(old["metrics"])
    assert not {"AP_class_ring", "AP_class_triangle"} & set(old["metrics"])  # new, and not annotated there
    assert set(old["before"]) == set(old["metrics"])
    assert f"AP {old['metrics']['AP']:.3f} on 9 annotated images; it was {old['before']['AP']:.3f}" in printed
    assert read_json(run.output_dir / "run.json")["old_data"] == str(folder / "old_data")
    assert "AP before training" in (run.output_dir / "README.md").read_text(encoding="utf-8")


def test_an_annotated_old_class_is_not_annotated_by_the_detector(folder, tmp_path, monkeypatch):
    """The data call it by a synonym. It keeps the name of the detector."""
    monkeypatch.setattr(report, "save_report", lambda *args: [])
    for name, num_images, seed in (("train", 6, 0), ("validation", 4, 1)):
        write_scenes(tmp_path / "data" / name, num_images, seed, ["box", "star"], box="sofa")
    save_detector(tmp_path / "old", ["disc", "couch", "triangle"])
    run, printed = run_quietly(
        tmp_path / "data",
        model=tmp_path / "old",
        keep_classes=True,
        output_dir=tmp_path / "out",
        **QUICK | {"num_train_epochs": 1},
    )
    old = OldClasses.read(run.output_dir)
    assert list(run.trainer.model.config.id2label.values()) == ["disc", "couch", "triangle", "star"]
    assert {entry[0] for images in old.boxes.values() for entries in images.values() for entry in entries} <= {0, 2}
    assert "learnt from these annotations alone: couch" in printed
    assert set(run.evaluation.old_classes["others_before"]) >= {"AP", "AP_class_sofa"}
    assert "Before training, the held-out AP of sofa was" in printed


def test_an_old_detector_that_finds_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "save_report", lambda *args: [])
    save_detector(tmp_path / "old", OLD, bias=-99.0)
    run, printed = run_quietly(
        folder / "data",
        model=tmp_path / "old",
        keep_classes=True,
        output_dir=tmp_path / "out",
        **QUICK | {"num_train_epochs": 1},
    )
    assert "finds fewer than 10 objects each of disc, box, triangle" in printed
    assert "cannot learn" not in printed
    assert "Old classes (disc, box, triangle): not measured" in printed
    assert run.evaluation.old_classes["metrics"] == {}
    assert "were not measured" in (run.output_dir / "README.md").read_text(encoding="utf-8")


def test_all_classes_may_be_annotated(folder, tmp_path):
    write_scenes(tmp_path / "data", 8, 0, [*OLD, "star"])
    _, printed = run_quietly(
        tmp_path / "data", model=folder / "old", keep_classes=True, output_dir=tmp_path / "out", dry_run=True, **QUICK
    )
    assert "annotate all 3 classes of the detector, so --keep-classes has no class to keep" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "somewhere"}, r"name it by --model"),
        ({"model": "untrained"}, r"untrained has a configuration but no weights"),
        (
            {"model": "old", "old_data": "data"},
            r"no object of the old classes: disc, box, triangle\. Its classes are star, ring",
        ),
        ({"model": "old", "keep_classes": None, "old_data": "old_data"}, "add --keep-classes"),
    ],
)
def test_settings_that_do_not_fit(folder, tmp_path, settings, message):
    tiny_config(num_denoising=5).save_pretrained(folder / "untrained")
    settings = {name: folder / value if isinstance(value, str) else value for name, value in settings.items()}
    settings = {"keep_classes": True, "output_dir": tmp_path / "out"} | settings
    with pytest.raises(ValueError, match=message):
        run_quietly(folder / "data", **settings)


def test_two_processes_share_the_images(folder, tmp_path):
    run_processes("old_classes", 2, folder / "data", folder / "old", tmp_path / "out")


def test_the_summary_says_what_is_not_known():
    measured = {"classes": OLD, "is_agreement": False, "dataset": None, "num_images": 7, "metrics": {"AP": 0.25}}
    measured |= {"before": {}, "others_before": {}, "missing": "The AP before training is not known. It is gone."}
    assert summary_lines(measured) == [
        "Old classes (disc, box, triangle): AP 0.250 on 7 annotated images.",
        "The AP before training is not known. It is gone.",
    ]
