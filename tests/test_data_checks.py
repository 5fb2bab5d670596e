"""The doctor of data: each way to break a data set has its name, and is the only thing that is said to be wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from broken_data import CASES, as_raw, break_data, make_data, make_picture
from data_layouts import annotations_of
from dino_hf.data.box_layouts import guess_reading
from dino_hf.data.image_facts import ImageFacts, near_copies
from dino_hf.data.raw import Problem, RawDataset, RawSplit, make_box_table
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.kinds import KINDS


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sound"
    return as_raw(folder, make_data(folder))


def offender_text(one) -> str:
    return f"{one.split}: {one.where}: {one.file}: {one.value}"


def test_data_as_they_should_be_have_nothing_wrong(sound):
    report = inspect(sound)
    assert {finding.kind for finding in report.findings} == {"image-without-boxes"}
    assert not report.has_errors
    (finding,) = report.findings
    assert (finding.severity, finding.count) == ("note", 2)
    assert [(one.split, one.file) for one in finding.offenders] == [("train", "003.jpg"), ("validation", "103.jpg")]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_each_way_to_break_data_is_named_and_nothing_else(case, tmp_path):
    report = inspect(break_data(case, tmp_path / "data"))
    found = {finding.kind: finding for finding in report.findings}
    assert case.kind in found
    severity = found[case.kind].severity
    serious = {finding.kind for finding in report.findings if finding.severity != "note"}
    assert serious - set(case.also) == ({case.kind} if severity != "note" else set())
    assert report.has_errors == (severity == "error")
    finding = found[case.kind]
    assert finding.count == case.count
    assert case.first in offender_text(finding.offenders[0]) or case.first in finding.what
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["findings"][0]["kind"] == report.findings[0].kind


def test_an_image_of_too_many_pixels_is_not_called_damaged(tmp_path, monkeypatch):
    raw = as_raw(tmp_path, make_data(tmp_path))
    monkeypatch.setattr("dino_hf.common.images.MAX_PIXELS", 104 * 70 - 1)
    found = {finding.kind: finding for finding in inspect(raw).findings}
    assert "image-broken" not in found
    assert found["image-too-large"].severity == "error"
    assert "104 x 70 pixels" in found["image-too-large"].offenders[0].value


def test_images_of_16_bits_are_dark_below_a_quarter_of_the_range(tmp_path):
    raw = as_raw(tmp_path, make_data(tmp_path))
    values = np.zeros((70, 104), dtype=np.uint16)
    values[3, 5] = 2**14
    Image.fromarray(values).save(tmp_path / "train" / "002.png")
    assert "image-mode" not in {finding.kind for finding in inspect(raw).findings}


def test_every_kind_that_is_known_is_tested():
    assert len({case.kind for case in CASES}) > 40
    assert set(KINDS) - {case.kind for case in CASES} == {
        "no-categories",
        "no-images",
        "image-too-large",
        "stated-size-unclear",
        "stated-size-wrong",
        "area-not-number",
        "only-crowds",
        "name-not-utf8",
        "image-without-boxes",
        "boxes-are-xywh",
        "boxes-are-pixels",
        "boxes-are-percent",  # in test_box_layouts.py, as the next one
        "boxes-are-swapped",
        "outside",  # in test_untrusted_data.py
    }  # of which below


def table_of(boxes, sizes=(100, 60)):
    """Of one image."""
    annotations = [{"image_id": 0, "category_id": 1, "bbox": list(box)} for box in boxes]
    split = RawSplit("train", "here", [{"id": 0, "width": sizes[0], "height": sizes[1]}], annotations_of(annotations))
    return make_box_table(split, [{"id": 1, "name": "cat"}])


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    """(count, 4) x, y, width, height inside of 100 x 60."""
    first, second = np.random.default_rng(seed).uniform(0, (100, 60), (2, count, 2))
    low, high = np.minimum(first, second), np.maximum(first, second)
    return np.concatenate([low, high - low], axis=1)


@pytest.mark.parametrize("seed", range(20))
def test_right_boxes_are_never_taken_for_another_layout(seed):
    """Also few of them, large ones, and some that stick out."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(int(rng.integers(1, 40)), seed)
    assert guess_reading([table_of(boxes)], "coco").is_as_read
    boxes[: len(boxes) // 5, 2:] *= 1.5
    assert guess_reading([table_of(boxes)], "coco").is_as_read
    frames = np.concatenate([rng.uniform(0, 4, (12, 2)), rng.uniform(90, 96, (12, 1)), rng.uniform(50, 56, (12, 1))], 1)
    assert guess_reading([table_of(frames)], "coco").is_as_read  # whole pictures: nearly the same as corners


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("layout", ["xyxy", "cxcywh"])
def test_other_layouts_are_recognised_with_a_few_wrong_boxes_among_them(layout, seed):
    boxes = random_boxes(400, seed)
    x, y, w, h = boxes.T
    written = np.stack({"xyxy": [x, y, x + w, y + h], "cxcywh": [x + w / 2, y + h / 2, w, h]}[layout], axis=1)
    written[0] = 300, 300, 400, 400
    reading = guess_reading([table_of(written)], "coco")
    assert (reading.layout, reading.is_relative, reading.is_as_read, reading.is_sure) == (layout, False, False, True)
    np.testing.assert_allclose(reading.to_xywh(table_of(written), "coco")[1:], boxes[1:], atol=1e-12)


def test_one_split_of_another_layout_is_found_beside_a_large_one_that_is_right():
    right, wrong = random_boxes(2000), random_boxes(30, seed=1)
    wrong[:, 2:] += wrong[:, :2]
    images = [{"id": 0, "file_name": "a.png", "width": 100, "height": 60}]
    splits = {}
    for name, boxes in (("train", right), ("validation", wrong)):
        annotations = [{"image_id": 0, "category_id": 1, "bbox": box} for box in boxes.tolist()]
        splits[name] = RawSplit(name, name, images, annotations_of(annotations))
    report = inspect(RawDataset("coco", "here", splits, [{"id": 1, "name": "cat"}], []), check_images=False)
    (finding,) = [finding for finding in report.findings if finding.kind == "boxes-are-corners"]
    assert (finding.count, finding.offenders[0].split) == (30, "validation")
    assert "certainly two corners: of 30 boxes, " in finding.what
    assert report.readings["train"].is_as_read


@pytest.mark.parametrize(
    ("kind", "layout", "to_text"),
    [
        ("boxes-are-corners", "xyxy", lambda x, y, w, h: (x / 100, y / 60, (x + w) / 100, (y + h) / 60)),
        ("boxes-are-xywh", "xywh", lambda x, y, w, h: (x / 100, y / 60, w / 100, h / 60)),
        ("boxes-are-pixels", "cxcywh", lambda x, y, w, h: (x + w / 2, y + h / 2, w, h)),
    ],
)
def test_numbers_of_yolo_that_are_not_centres_relative_to_the_image(kind, layout, to_text):
    boxes = random_boxes(60)
    cx, cy, w, h = np.array([to_text(*box) for box in boxes]).T
    as_read = np.stack([(cx - w / 2) * 100, (cy - h / 2) * 60, w * 100, h * 60], axis=1)  # as YOLO's reader does
    annotations = [{"image_id": 1, "category_id": 0, "bbox": box, "where": "x"} for box in as_read.tolist()]
    images = [{"id": 1, "file_name": "a.png", "width": 100, "height": 60}]
    raw = RawDataset(
        "yolo",
        "here",
        {"train": RawSplit("train", "here", images, annotations_of(annotations))},
        [{"id": 0, "name": "cat"}],
        [],
    )
    report = inspect(raw, check_images=False)
    assert [finding.kind for finding in report.findings if finding.severity == "error"] == [kind, "image-missing"]
    reading = report.readings["train"]
    assert (reading.layout, reading.is_sure) == (layout, True)
    np.testing.assert_allclose(reading.to_xywh(table_of(as_read), "yolo"), boxes, atol=1e-9)


def test_splits_and_categories_that_are_not_there(tmp_path):
    empty = RawSplit("test", "here/test", [], annotations_of([]))
    contents = make_data(tmp_path)
    raw = as_raw(tmp_path, contents)
    report = inspect(raw._replace(splits=raw.splits | {"test": empty}, categories=[]))
    errors = {finding.kind: finding for finding in report.findings if finding.severity == "error"}
    assert set(errors) == {"no-categories", "no-images", "unknown-category"}
    assert errors["no-images"].offenders[0].value == "split 'test'"
    assert inspect(RawDataset("coco", "here", {}, [], [])).has_errors


def test_images_are_not_opened_if_not_wanted(tmp_path):
    contents = make_data(tmp_path)
    (tmp_path / "train" / "000.png").write_text("this is no image")
    (tmp_path / "train" / "002.png").unlink()
    report = inspect(as_raw(tmp_path, contents), check_images=False)
    assert [finding.kind for finding in report.findings] == ["image-missing", "image-without-boxes"]
    assert not report.images_were_decoded
    contents["validation"]["images"][0]["path"] = tmp_path / "train" / "001.jpg"  # the same file, which needs no look
    found = inspect(as_raw(tmp_path, contents), check_images=False).findings
    assert "leak" in [finding.kind for finding in found]


def test_progress_reaches_the_number_of_images(sound):
    steps = []
    inspect(sound, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (10, 10)


def test_different_pictures_are_no_near_copies(tmp_path):
    """A shifted, a mirrored and a cropped picture are others; the same at half the size, or as a worse JPEG, is not."""
    picture = make_picture(0, 180, 120)
    variants = {
        "shifted": Image.fromarray(np.roll(np.asarray(picture), 12, axis=1)),
        "mirrored": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "cropped": picture.crop((18, 12, 180, 120)),
        "half": picture.resize((90, 60)),
        "white": Image.new("RGB", (180, 120), "white"),
        "paper": Image.new("RGB", (180, 120), "#fdfdfd"),
    }
    picture.save(tmp_path / "original.png")
    picture.save(tmp_path / "jpeg.jpg", quality=30)
    for name, variant in variants.items():
        variant.save(tmp_path / f"{name}.png")
    paths = sorted(tmp_path.iterdir())
    images = [{"id": number, "file_name": path.name, "path": path} for number, path in enumerate(paths)]
    split = RawSplit(
        "train", tmp_path, images, annotations_of([{"image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 40]}])
    )
    report = inspect(RawDataset("coco", tmp_path, {"train": split}, [{"id": 1, "name": "cat"}], []))
    (finding,) = [finding for finding in report.findings if finding.kind == "near-copy"]
    names = {"original.png", "half.png", "jpeg.jpg"}
    assert {one.file for one in finding.offenders} < names
    assert len(finding.offenders) == 2


def test_an_image_that_looks_like_held_out_ones_is_a_leak_whatever_else_it_looks_like(tmp_path):
    """Frames of a fixed camera: all look like all, and in one of them the same bytes are in both splits."""
    noise = np.random.default_rng(0)
    picture = np.asarray(make_picture(0, 180, 120)).astype(int)
    splits = {}
    for name in ("train", "validation"):
        images = []
        for number in range(4):
            frame = np.clip(picture + noise.integers(-6, 7, picture.shape), 0, 255).astype(np.uint8)
            path = tmp_path / f"{name}_{number}.png"
            Image.fromarray(frame).save(path)
            images.append({"id": len(splits) * 10 + number, "file_name": path.name, "path": path})
        splits[name] = RawSplit(
            name, tmp_path, images, annotations_of([{"image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 40]}])
        )
    (tmp_path / "train_0.png").write_bytes((tmp_path / "validation_0.png").read_bytes())
    report = inspect(RawDataset("coco", tmp_path, splits, [{"id": 1, "name": "cat"}], []))
    found = {finding.kind: [one.file for one in finding.offenders] for finding in report.findings}
    assert found["leak"] == ["train_0.png"]
    assert sorted(found["near-leak"]) == [f"train_{number}.png" for number in (1, 2, 3)]
    assert sorted(found["near-copy"]) == [f"validation_{number}.png" for number in (1, 2, 3)]
    (near,) = [finding for finding in report.findings if finding.kind == "near-leak"]
    assert {one.other for one in near.offenders} == {("validation", 0)}


def test_many_frames_that_look_alike_take_no_more_comparisons_than_neighbours():
    noise = np.random.default_rng(0)
    base = noise.integers(0, 255, (32, 32))
    frames = [np.clip(base + noise.integers(-2, 3, base.shape), 0, 255).astype(np.uint8) for _ in range(300)]
    facts = [ImageFacts(size=(64, 48), digest=bytes([n % 256, n // 256]), thumbnail=f) for n, f in enumerate(frames)]
    pairs = np.concatenate(list(near_copies(facts)))
    assert np.unique(pairs).tolist() == list(range(300))
    assert len(pairs) <= 300 * 63 < 300 * 299 / 2
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_ids_of_boxes_within_their_image_repeat_nothing(sound):
    train = sound.splits["train"]
    entries = [{**entry, "id": 0} for entry in train.annotations]
    raw = sound._replace(splits={**sound.splits, "train": train._replace(annotations=annotations_of(entries))})
    kinds = {
        name: [f.kind for f in inspect(raw._replace(format=name), check_images=False).findings]
        for name in ("coco", "huggingface")
    }
    assert "duplicate-annotation-id" in kinds["coco"]
    assert "duplicate-annotation-id" not in kinds["huggingface"]


def test_all_offenders_are_counted_and_the_first_thousand_named():
    images = [{"id": 0, "file_name": "a.png", "width": 100, "height": 60}]
    annotations = [{"image_id": 0, "category_id": 1, "bbox": [1, 2, -3, 4 + number]} for number in range(1500)]
    raw = RawDataset(
        "coco",
        "here",
        {"train": RawSplit("train", "here", images, annotations_of(annotations))},
        [{"id": 1, "name": "cat"}],
        [],
    )
    found = {finding.kind: finding for finding in inspect(raw, check_images=False).findings}
    assert found["box-negative"].count == 1500
    assert [one.annotation for one in found["box-negative"].offenders] == list(range(1000))


def test_the_worst_images_for_memory_and_the_histograms(sound):
    statistics = inspect(sound).statistics
    assert statistics["largest_image"] == {
        "split": "train",
        "file": "005.jpg",
        "width": 125,
        "height": 79,
        "boxes": 4,
    }
    assert statistics["most_boxes"]["boxes"] == 4
    assert statistics["splits"]["train"] == {"images": 6, "boxes": 20, "crowds": 0, "images_without_boxes": 1}
    assert [entry["boxes"] for entry in statistics["classes"]] == [
        {"train": 5, "validation": 3},
        {"train": 10, "validation": 6},
        {"train": 5, "validation": 3},
    ]
    boxes = np.array([entry["bbox"] for entry in sound.splits["train"].annotations])
    small = int((boxes[:, 2] * boxes[:, 3] < 32**2).sum())
    assert statistics["sizes"]["train"] == {"small": small, "medium": 20 - small, "large": 0}
    for kind in ("relative_sizes", "aspect_ratios"):
        assert sum(statistics[kind]["train"]) == 20
    assert statistics["boxes_per_image"]["train"] == [1, 0, 0, 5, 0, 0, 0, 0, 0, 0]


def test_images_that_yolos_reader_could_not_read_are_named_once(tmp_path):
    contents = make_data(tmp_path)
    (tmp_path / "train" / "002.png").write_text("this is no image")
    problem = Problem("unreadable-image", str(tmp_path / "train" / "002.png"), "002.png cannot be read.")
    raw = as_raw(tmp_path, contents, (problem,))
    kinds = [
        [f.kind for f in inspect(raw, check_images=look).findings if f.severity == "error"] for look in (True, False)
    ]
    assert kinds == [["image-broken"], ["unreadable-image"]]


@pytest.mark.parametrize(
    ("num_leaving", "num_boxes", "is_as_read"), [(2, 10, True), (3, 10, False), (3, 30, False), (3, 31, True)]
)
def test_three_boxes_and_a_tenth_must_leave_before_another_reading_is_tried(num_leaving, num_boxes, is_as_read):
    fitting = [[10, 10, 30, 30]] * (num_boxes - num_leaving)  # as corners too
    table = table_of(fitting + [[60, 20, 90, 50]] * num_leaving)
    assert guess_reading([table], "coco").is_as_read == is_as_read
