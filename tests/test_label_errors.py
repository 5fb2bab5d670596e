"""Planted label errors are found at the top of the ranking. The detections are fixed, and nearly right."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli.app import app
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.data.load import load_coco
from dino_hf.data.raw import fill_sizes
from dino_hf.data.recognise import read_raw
from dino_hf.data.rows import ClassSpace, annotation_names
from dino_hf.evaluation.label_error_pages import save_label_errors
from dino_hf.evaluation.label_errors import KINDS, find_label_errors, write_suspects
from helpers import tiny_config
from label_errors import found_error, plant_errors

IDS = sorted(CATEGORIES)


class FixedDetector:
    """Detections of the objects that `content` had before it was broken, with small errors, and some that are wrong."""

    name, model, category_ids = "fixed", None, IDS
    id2label = {index: CATEGORIES[category_id] for index, category_id in enumerate(IDS)}  # noqa: RUF012

    def __init__(self, content: dict, rng: np.random.Generator):
        self.rng, self.objects = rng, []
        for image in content["images"]:
            own = [one for one in content["annotations"] if one["image_id"] == image["id"] and not one["iscrowd"]]
            self.objects.append([(IDS.index(one["category_id"]), one["bbox"]) for one in own])

    def __call__(self, images, **settings):
        for _, objects in zip(images, self.objects, strict=True):
            rows = []
            for label, (x, y, width, height) in objects:
                dx, dy = self.rng.uniform(-0.04, 0.04, 2) * (width, height)
                box = [x + dx, y + dy, x + dx + width, y + dy + height]
                rows.append((label, box, self.rng.uniform(0.4, 0.95)))
                rows.append(((label + 1) % len(IDS), box, self.rng.uniform(0, 0.2)))  # an unlikely class
            rows.append((0, [2.0, 3.0, 30.0, 25.0], self.rng.uniform(0, 0.3)))  # background
            labels, boxes, scores = zip(*rows, strict=True)
            yield SimpleNamespace(labels=np.array(labels), boxes=np.array(boxes), scores=np.array(scores))


def plant(folder, num_images=80, seed=3):
    path = make_scenes(folder, num_images, seed)
    content = json.loads(path.read_text())
    detector = FixedDetector(content, np.random.default_rng(seed))
    errors = plant_errors(content, 0.1, seed)
    path.write_text(json.dumps(content))
    return path, detector, errors


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path, detector, errors = plant(tmp_path_factory.mktemp("planted") / "train")
    data, raw = load_coco(path, path.parent), read_raw(path.parent)
    names = annotation_names(fill_sizes(raw.splits["train"]), ClassSpace(data.id2label, data.category_ids))
    suspects, notes = find_label_errors(detector, data, split="train", annotations=names, batch_size=3)
    return data, suspects, notes, errors


def test_planted_errors_are_at_the_top(planted):
    _, suspects, notes, errors = planted
    assert notes == []
    found = [found_error(one, errors) for one in suspects[: len(errors)]]
    assert len(errors) >= 12
    assert np.mean([place is not None for place in found]) >= 0.75
    assert suspects == sorted(suspects, key=lambda one: -one.score)
    assert all(0 < one.score <= 1 for one in suspects)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_as_such(planted, kind):
    _, suspects, _, errors = planted
    wanted = {place for place, error in enumerate(errors) if error["kind"] == kind}
    own = [found_error(one, errors) for one in suspects if one.kind == kind][: 2 * len(wanted)]
    assert len(wanted & set(own)) >= 0.6 * len(wanted)


def test_an_annotation_has_one_suspicion_and_the_box_of_the_files(planted):
    data, suspects, _, _ = planted
    names = [one.annotation for one in suspects if one.annotation is not None]
    assert len(names) == len(set(names))
    for one in suspects[:20]:
        row = data.dataset[one.index]
        assert (row["image_id"], row["file_name"]) == (one.image_id, one.file_name)
        if one.box is not None:
            x0, y0, x1, y1 = one.box
            assert [x0, y0, x1 - x0, y1 - y0] in [pytest.approx(box) for box in row["objects"]["bbox"]]


def test_all_are_written_and_the_first_are_drawn(planted, tmp_path):
    data, suspects, _, _ = planted
    names = dict(CATEGORIES)
    write_suspects(tmp_path / "suspects.csv", suspects, names)
    rows = list(csv.DictReader((tmp_path / "suspects.csv").open(encoding="utf-8")))
    assert len(rows) == len(suspects)
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    assert {row["kind"] for row in rows} <= set(KINDS)
    for row, one in zip(rows, suspects, strict=True):
        assert (row["class"] == "") == (one.category_id is None)
        assert row["annotation"] == ("" if one.annotation is None else str(one.annotation))
    save_label_errors(tmp_path / "page.png", suspects, {"train": data}, names)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_right_labels_and_sure_detections_are_not_suspicious(tmp_path):
    path = make_scenes(tmp_path / "scenes", 6, seed=5)
    content = json.loads(path.read_text())
    detector = FixedDetector(content, np.random.default_rng(0))
    data = load_coco(path, path.parent)
    suspects, _ = find_label_errors(detector, data)
    assert all(one.score < 0.35 for one in suspects)


def test_classes_that_the_model_does_not_know_are_not_judged(planted, monkeypatch):
    data, _, _, _ = planted

    class KnowsNoStars(FixedDetector):
        id2label = {index: name if name != "star" else "LABEL_3" for index, name in FixedDetector.id2label.items()}  # noqa: RUF012

        def __init__(self):
            pass

        def __call__(self, images, **settings):
            for _ in images:
                yield SimpleNamespace(labels=np.zeros(0, int), boxes=np.zeros((0, 4)), scores=np.zeros(0))

    suspects, notes = find_label_errors(KnowsNoStars(), data)
    assert "does not know 1 class" in notes[0]
    assert suspects == []  # it finds nothing, so it says nothing about what it does not find


def test_the_command_ranks_labels_and_warns_of_learned_images(tmp_path):
    make_scenes(tmp_path / "data/train", 4, seed=0)
    names = {index: CATEGORIES[category_id] for index, category_id in enumerate(IDS)}
    model = DinoDetrForObjectDetection(tiny_config(id2label=names, category_ids=IDS))
    data = load_coco(tmp_path / "data/train/annotations.json", tmp_path / "data/train")
    from dino_hf.training.training_record import recorded_images

    model.config.provenance = {"training": {"images": recorded_images(data, [])}}
    model.save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(tmp_path / "model")
    words = ["doctor", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--pictures", str(tmp_path / "pictures")])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "was trained on 4 of the 4 images of train" in text
    assert "suspicious label" in text
    assert {path.name for path in (tmp_path / "pictures").iterdir()} >= {"suspects.csv", "label-errors.png"}
    again = CliRunner().invoke(app, [*words, "--pictures", str(tmp_path / "pictures"), "--overwrite"])
    assert again.exit_code == 0, again.output
