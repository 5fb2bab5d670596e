"""Every way to read data has the options that refusals name, a part is read alone, and settings of strangers are bounded."""

import inspect as python_inspect
import json
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

import dino_hf
from dino_hf.cli.app import app
from dino_hf.common.regular_files import DEEPEST_SETTINGS, check_model_folder, read_settings
from dino_hf.data import load_data, read_raw
from dino_hf.doctor import inspect
from dino_hf.evaluation import load_split
from dino_hf.inference.loading import load_detector, load_image_processor
from dino_hf.run.record import RUN_NAME, RunRecord
from dino_hf.run.starting_model import load_start
from helpers import tiny_config

OPTIONS = ("allow_outside", "trust_boxes", "box_format")


def write_coco(folder, boxes, size=(60, 40), stated=True, images=2):
    """Each image has all boxes."""
    folder.mkdir(parents=True)
    for number in range(images):
        Image.new("RGB", size, (number * 50, 90, 200)).save(folder / f"{number}.png")
    sides = {"width": size[0], "height": size[1]} if stated else {}
    content = {
        "images": [{"id": number, "file_name": f"{number}.png", **sides} for number in range(images)],
        "annotations": [
            {"id": images * place + number, "image_id": number, "category_id": 1, "bbox": box}
            for place, box in enumerate(boxes)
            for number in range(images)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


CORNERS = [[30 + x, 20 + y, 55 + x, 38 + y] for x in range(4) for y in range(2)]  # xyxy, in an image of 60 x 40


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_every_way_to_read_data_has_the_options_that_refusals_name():
    for function in (dino_hf.train, dino_hf.evaluate, dino_hf.export_onnx, load_data, load_split):
        assert set(OPTIONS) <= set(python_inspect.signature(function).parameters), function
    for command in ("train", "eval", "export", "augment", "doctor"):
        help_text = run(command, "--help").output
        for option in OPTIONS:
            assert f"--{option.replace('_', '-')}" in help_text, (command, option)


def test_boxes_that_are_trusted_are_drawn_and_pass_the_doctor(tmp_path):
    data = write_coco(tmp_path / "train", CORNERS)
    refused = run("augment", data, "--output", tmp_path / "grid.png")
    assert refused.exit_code == 1
    assert "--trust-boxes" in refused.output
    drawn = run(
        "augment", data, "--output", tmp_path / "grid.png", "--trust-boxes", "--num-images", 1, "--num-samples", 1
    )
    assert drawn.exit_code == 0, drawn.output
    raw = read_raw(data)
    assert any(finding.kind.startswith("boxes-are") for finding in inspect(raw).findings)
    assert not any(finding.kind.startswith("boxes-are") for finding in inspect(raw, trust_boxes=True).findings)


def test_images_outside_are_drawn_where_that_is_allowed(tmp_path):
    data = write_coco(tmp_path / "train", [[5, 6, 20, 11]])
    shutil.move(data / "1.png", tmp_path / "1.png")
    (data / "1.png").symlink_to(tmp_path / "1.png")
    arguments = ("augment", data, "--output", tmp_path / "grid.png", "--num-images", 2, "--num-samples", 1)
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "--allow-outside" in refused.output
    allowed = run(*arguments, "--allow-outside")
    assert allowed.exit_code == 0, allowed.output


def test_a_resumed_run_tells_other_options_of_reading(tmp_path):
    recorded = {"settings": {}, "data": {"train": 1, "held_out": None, "classes": []}, "start": "", "start_notes": []}
    recorded |= {"seed": 0, "recipe": "finetune", "allow_outside": False, "trust_boxes": False, "on_bad_image": "skip"}
    (tmp_path / RUN_NAME).write_text(json.dumps(recorded))
    record = RunRecord.open(tmp_path, resume=True)
    record.choose({"allow_outside": True, "trust_boxes": None, "on_bad_image": "raise", "recipe": None, "seed": None})
    record.add_settings({})
    changes = record.changes()
    assert sorted(changes) == [
        "the run continues with allow_outside True; it was False before.",
        "the run continues with on_bad_image raise; it was skip before.",
    ]


def test_relative_boxes_are_refused_in_one_place_with_or_without_sizes(tmp_path):
    relative = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.2, 0.3]]
    for stated in (True, False):
        data = write_coco(tmp_path / f"{stated}" / "train", relative, stated=stated)
        with pytest.raises(
            ValueError, match="the boxes are relative to the image, while coco data have them in pixels"
        ):
            load_data(data)
        kinds = {finding.kind for finding in inspect(read_raw(data), check_images=False).findings}
        assert "boxes-are-normalised" in kinds
    # border: a box that is more than one pixel tells pixels, where no size is known because no image is opened
    data = write_coco(tmp_path / "pixels" / "train", [*relative, [0.5, 0.5, 0.6, 0.4]], stated=False, images=3)
    kinds = {finding.kind for finding in inspect(read_raw(data), check_images=False).findings}
    assert "boxes-are-normalised" not in kinds
    with pytest.raises(ValueError, match="the boxes are relative to the image"):
        load_data(data)


def test_a_part_is_read_and_told_of_without_the_others(tmp_path):
    write_coco(tmp_path / "data" / "train", [[5, 6, 20, 11], [5, 6, 0, 11]])
    write_coco(tmp_path / "data" / "test", [[5, 6, 20, 11], [7, 6, 0, 11]])
    part, notes = load_split(tmp_path / "data", "test")
    assert len(part.dataset) == 2
    about_sizes = [note for note in notes if "have no size" in note]
    assert len(about_sizes) == 1
    assert ", test: 2 boxes have no size" in about_sizes[0]
    assert not any("held out" in note for note in notes)
    # without validation images the training images are divided, and only they are told of
    _, notes = load_split(tmp_path / "data", "validation")
    assert [note.split(": ")[0].endswith(", train") for note in notes if "have no size" in note] == [True]
    # a missing image of another part stops nothing
    (tmp_path / "data" / "train" / "0.png").unlink()
    assert len(load_split(tmp_path / "data", "test")[0].dataset) == 2
    with pytest.raises(FileNotFoundError):
        load_split(tmp_path / "data", "train")


def nested(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "generation_config.json"])
@pytest.mark.parametrize("levels", [DEEPEST_SETTINGS, 10**5])
def test_settings_that_are_nested_too_deeply_are_one_sentence(name, levels, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / name).write_text(f'{{"model_type": "dino_detr", "x": {nested(levels)}}}')
    for read in (check_model_folder, load_detector, load_image_processor, lambda folder: load_start(folder, None, 0)):
        with pytest.raises(ValueError, match=f"{name}.* nested (too deeply|more than {DEEPEST_SETTINGS} deep)"):
            read(tmp_path)


def test_settings_at_the_border_of_depth_are_read(tmp_path):
    (tmp_path / "config.json").write_text(nested(DEEPEST_SETTINGS))
    assert read_settings(tmp_path / "config.json")[0]


@pytest.mark.parametrize("name", [RUN_NAME])
def test_a_record_that_is_nested_too_deeply_is_damaged(name, tmp_path):
    (tmp_path / name).write_text(f'{{"settings": {nested(10**5)}}}')
    with pytest.raises(ValueError, match="is damaged"):
        RunRecord.open(tmp_path, resume=True)
