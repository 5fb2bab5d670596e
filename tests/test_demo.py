"""The demo at toy size: every stage runs and leaves what it says."""

import errno

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from typer import Typer
from typer.testing import CliRunner

from demo import DemoArguments, prepare, run
from dino_hf import DinoDetrConfig
from dino_hf.cli.app import app
from dino_hf.cli.scenes import scenes


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    arguments = DemoArguments(str(output), num_train_images=6, num_eval_images=4, epochs=1, batch_size=3, threshold=0.0)
    return output, arguments, run(arguments)


def test_scores_model_and_pictures_are_left(demo):
    output, _, scores = demo
    assert 0 <= scores["AP"] <= 1
    model = AutoModelForObjectDetection.from_pretrained(output / "model")
    assert model.config.id2label == {0: "disc", 1: "box", 2: "triangle", 3: "star", 4: "ring"}
    assert AutoImageProcessor.from_pretrained(output / "model").size["shortest_edge"] == 96
    card = ModelCard.load(output / "model/README.md")
    assert card.data.eval_results[0].metric_value == round(scores["AP"], 4)
    for name in ("detections.png", "model/curves.png"):
        with Image.open(output / name) as picture:
            assert picture.width > 500
            assert len(picture.convert("L").resize((64, 32)).getcolors()) > 10  # not blank


def test_a_second_run_replaces_the_first_and_leaves_what_is_not_its_own(demo):
    output, arguments, _ = demo
    (output / "mine.txt").write_text("mine")
    prepare(arguments)
    assert sorted(path.name for path in output.iterdir()) == [".dino_hf_demo", "mine.txt"]


def test_a_broken_off_run_can_be_repeated(tmp_path):
    arguments = DemoArguments(str(tmp_path / "out"))
    prepare(arguments)
    (tmp_path / "out" / "scenes").mkdir()
    prepare(arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".dino_hf_demo"]


@pytest.mark.parametrize("name", ["results.json", "mine.txt"])
def test_other_folders_are_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match="nor from an earlier demo"):
        run(DemoArguments(str(tmp_path), num_train_images=6))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_settings_are_checked_before_anything_is_touched(tmp_path):
    with pytest.raises(SystemExit, match="num_eval_images=0 must be at least 1"):
        run(DemoArguments(str(tmp_path / "out"), num_eval_images=0))
    assert not (tmp_path / "out").exists()


def test_scenes_command(tmp_path):
    single = Typer()
    single.command()(scenes)
    folder = tmp_path / "scenes"
    result = CliRunner().invoke(single, [str(folder), "--num-train", "3", "--num-validation", "2"])
    assert result.exit_code == 0, result.output
    assert len(list((folder / "train").glob("*.png"))) == 3
    assert AutoConfig.from_pretrained(folder / "untrained").category_ids == [3, 7, 12, 21, 40]
    result = CliRunner().invoke(single, [str(folder)])
    assert result.exit_code == 1
    assert f"error: {folder} has files that are not of drawn scenes; choose a new or empty folder" in result.stderr


def test_scenes_that_cannot_be_finished_leave_nothing(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DinoDetrConfig, "save_pretrained", full)
    result = CliRunner().invoke(app, ["scenes", str(tmp_path / "a"), "--num-train", "2", "--num-validation", "2"])
    assert result.stderr == "error: No space left on device: the disk is full; make room, or choose another place.\n"
    assert not list(tmp_path.iterdir())
