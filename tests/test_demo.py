"""The demo at toy size: every stage runs and leaves what it says."""

import json

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from dino_hf.tools.demo import DemoArguments, run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    arguments = DemoArguments(str(output), num_train_images=6, num_eval_images=4, epochs=1, batch_size=3, threshold=0.0)
    return output, arguments, run(arguments)


def test_scores_model_and_pictures_are_left(demo):
    output, _, scores = demo
    assert json.loads((output / "results.json").read_text()) == scores
    assert 0 <= scores["eval_AP"] <= 1
    model = AutoModelForObjectDetection.from_pretrained(output / "model")
    assert model.config.id2label == {0: "disc", 1: "box", 2: "triangle", 3: "star", 4: "ring"}
    assert AutoImageProcessor.from_pretrained(output / "model").size["shortest_edge"] == 96
    for name in ("detections.png", "curves.png"):
        with Image.open(output / name) as picture:
            assert picture.width > 500
            assert len(set(picture.convert("L").resize((64, 32)).getdata())) > 10  # not blank


def test_it_replaces_its_own_earlier_run_only(demo, tmp_path):
    output, arguments, _ = demo
    (tmp_path / "mine.txt").write_text("mine")
    arguments = DemoArguments(str(tmp_path), num_train_images=6)
    with pytest.raises(SystemExit, match="holds no earlier demo"):
        run(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (output / "results.json").exists()
