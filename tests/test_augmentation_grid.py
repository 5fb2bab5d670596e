"""The picture of augmented samples and its command: what training gets is what is drawn, and errors are one sentence."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dino_hf import DinoDetrImageProcessor
from dino_hf.cli import augmentation_grid
from dino_hf.cli.app import app
from dino_hf.cli.augmentation_grid import save_augmentation_grid
from dino_hf.common.scenes import make_scenes
from dino_hf.run.training_run import train
from dino_hf.training import DetectionTransform, load_coco
from dino_hf.training.augmentation import Augmentation
from dino_hf.training.trainer import DinoDetrTrainer
from helpers import tiny_config

AUGMENTATION = Augmentation(short_sides=(96, 128), longest_side=200, crop_short_sides=(80,), crop_sizes=(50, 70))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "images", 6, seed=8)


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn in each cell: image, boxes, labels, texts; and the title."""
    cells = []

    def record(axes, *content):
        cells.append([axes, *content])

    monkeypatch.setattr(augmentation_grid, "show_boxes", record)
    return cells


def augment(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["augment", *map(str, arguments)])
    return result.exit_code, result.output


def test_each_row_is_an_image_and_what_training_gets_of_it(scenes, drawn, tmp_path):
    data = load_coco(scenes, scenes.parent)
    save_augmentation_grid(tmp_path / "grid.png", data, AUGMENTATION, num_images=6, num_samples=2, seed=4)
    assert len(drawn) == 6 * 3
    rows = {row["image_id"]: row for row in data.dataset}
    transform = DetectionTransform(DinoDetrImageProcessor(), AUGMENTATION, seed=4)
    num_crowds, seen = 0, set()
    for number in range(0, len(drawn), 3):
        title = drawn[number][0].get_title()
        row = rows[int(re.match(r"image (\d+): ", title)[1])]
        seen.add(row["image_id"])
        image, objects = row["image"], row["objects"]
        assert title.endswith(f": {image.width} x {image.height}")
        _, picture, boxes, labels, texts = drawn[number]
        assert labels == objects["category"]
        scale = picture.width / image.width
        expected = [[x, y, x + w, y + h] for x, y, w, h in objects["bbox"]]
        # the picture has whole pixels, 250 or more of them
        np.testing.assert_allclose(np.reshape(boxes, (-1, 4)) / scale, np.reshape(expected, (-1, 4)), rtol=0.01)
        for epoch in (0, 1):
            transform.set_epoch(epoch)
            sample = transform({name: [value] for name, value in row.items()})
            pixels, targets = sample["pixel_values"][0], sample["labels"][0]
            axes, picture, boxes, labels, texts = drawn[number + 1 + epoch]
            height, width = pixels.shape[1:]
            assert axes.get_title() == f"epoch {epoch}: {width} x {height}"
            assert labels[: len(targets["class_labels"])] == targets["class_labels"].tolist()
            crowds = texts[len(targets["class_labels"]) :]
            assert all(text.endswith(" (crowd)") for text in crowds)
            num_crowds += len(crowds)
            corners = torch.tensor(boxes[: len(targets["boxes"])]).reshape(-1, 4)
            center = (corners[:, :2] + corners[:, 2:]) / 2 / torch.tensor(picture.size)
            torch.testing.assert_close(center, targets["boxes"][:, :2], rtol=0, atol=0.005)  # whole pixels, as above
            colours = torch.tensor(np.asarray(picture)).float().mean((0, 1)) / 255
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            # 8 bits, and a resize for the picture
            torch.testing.assert_close(colours, pixels.mean((1, 2)) * std + mean, rtol=0, atol=0.01)
    assert seen == set(rows)
    assert num_crowds > 0


def test_the_command_draws_the_augmentation_of_a_recipe(scenes, tmp_path):
    output = tmp_path / "grid.png"
    arguments = (scenes, "--output", output, "--num-images", 2, "--num-samples", 1)
    assert augment(*arguments) == (0, f"The picture is in {output}.\n")
    with Image.open(output) as picture:
        first = picture.convert("RGB")
    assert first.size == (600, 550)
    assert len(first.resize((64, 64)).getcolors(4096)) > 100  # not blank
    assert augment(*arguments, "--recipe", "finetune", "--seed", 1, "--overwrite")[0] == 0
    with Image.open(output) as picture:
        assert picture.convert("RGB").tobytes() != first.tobytes()


@pytest.fixture
def model(tmp_path):
    """A configuration without weights, and an image processor of small images."""
    tiny_config(num_denoising=5).save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 52}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def sizes(drawn) -> set[int]:
    """The short sides of what was drawn as augmented."""
    titles = [axes.get_title() for axes, *_ in drawn]
    numbers = [re.match(r"epoch \d+: (\d+) x (\d+)", title) for title in titles]
    return {min(int(found[1]), int(found[2])) for found in numbers if found}


def test_the_sizes_are_those_of_the_training(scenes, drawn, model, tmp_path):
    """Of the model that it starts from, or as options of `train` say."""
    arguments = (scenes, "--output", tmp_path / "grid.png", "--overwrite", "--num-images", 2, "--num-samples", 2)
    assert augment(*arguments)[0] == 0
    assert min(sizes(drawn)) > 300
    drawn.clear()
    assert augment(*arguments, "--model", model)[0] == 0
    assert max(sizes(drawn)) <= 40
    drawn.clear()
    assert augment(*arguments, "--short-sides", 100, "--crop", 0)[0] == 0
    assert sizes(drawn) == {100}
    exit_code, output = augment(*arguments, "--short-sidez", 100)
    assert (exit_code, "did you mean --short-sides" in output) == (1, True)


def test_a_run_shows_its_own_data_recipe_sizes_and_seed(scenes, drawn, model, tmp_path, monkeypatch):
    monkeypatch.chdir(scenes.parent)
    run = tmp_path / "run"
    settings = {"num_denoising": 5, "use_cpu": True, "report_to": "none", "horizontal_flip": 0.0, "crop": 0.0}
    monkeypatch.setattr(DinoDetrTrainer, "train", lambda self, **_: 1 / 0)  # the run is killed at its start
    with pytest.raises(ZeroDivisionError):
        train(scenes.name, model=model, output_dir=run, seed=3, short_sides=[44, 48], longest_side=60, **settings)
    monkeypatch.chdir(tmp_path)
    exit_code, output = augment(run, "--output", tmp_path / "grid.png", "--num-images", 9, "--num-samples", 2)
    assert exit_code == 0, output
    rows = {axes.get_title().split(":")[0]: axes for axes, *_ in drawn}
    assert len([name for name in rows if name.startswith("image")]) == 5  # one of six is held out
    assert sizes(drawn) <= {44, 48}
    transform = DetectionTransform(DinoDetrImageProcessor(), Augmentation(0.0, (44, 48), 60, crop=0.0), seed=3)
    row = next(row for row in load_coco(scenes, scenes.parent).dataset if f"image {row['image_id']}" in rows)
    expected = transform({name: [value] for name, value in row.items()})["pixel_values"][0].shape[1:]
    place = next(n for n, one in enumerate(drawn) if one[0].get_title().startswith(f"image {row['image_id']}:"))
    assert drawn[place + 1][0].get_title() == f"epoch 0: {expected[1]} x {expected[0]}"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"source": None}))
    exit_code, output = augment(run, "--output", tmp_path / "other.png")
    assert exit_code == 1
    assert "its data are not recorded. Name the data set itself, with --recipe scratch." in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.json",), "There is no file or folder none.json."),
        (("{scenes}", "--recipe", "paper"), "There is no recipe 'paper'"),
        (
            ("{scenes}", "--output", "none/grid.png"),
            "none/grid.png cannot be written; choose a file in an existing folder",
        ),
        (("{scenes}", "--output", "."), ". cannot be written"),
        (
            ("{scenes}", "--output", "grid"),
            "grid is not a supported kind of picture (.png, .jpg, .jpeg, .pdf, .svg)",
        ),
        (("{scenes}", "--output", "grid.foo"), "grid.foo is not a supported kind of picture (.png, .jpg,"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(scenes, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exit_code, output = augment(*(argument.format(scenes=scenes) for argument in arguments))
    assert exit_code == 1
    assert output.startswith("error: " + message.format(scenes=scenes))
    assert output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["grid.jpg", "grid.PNG", "grid.jpeg", "grid.pdf", "grid.svg"])
def test_the_picture_is_written_under_the_name_that_is_told(scenes, tmp_path, name):
    output = tmp_path / name
    assert augment(scenes, "--output", output, "--num-images", 1, "--num-samples", 1) == (
        0,
        f"The picture is in {output}.\n",
    )
    assert list(tmp_path.iterdir()) == [output]


def test_without_a_suffix_the_name_to_write_is_told(scenes, tmp_path):
    output = augment(scenes, "--output", tmp_path / "grid")[1]
    assert output.endswith(f"choose for example --output {tmp_path / 'grid.png'}.\n")


def test_an_image_that_does_not_fit_is_named(scenes, tmp_path):
    content = json.loads(scenes.read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = []
    Image.new("F", (content["images"][0]["width"], content["images"][0]["height"])).save(tmp_path / "000001.tif")
    content["images"][0]["file_name"] = "000001.tif"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    exit_code, output = augment(tmp_path / "annotations.json", "--output", tmp_path / "grid.png")
    assert exit_code == 1
    assert "000001.tif cannot be read. It has 32 bits per p" in output
