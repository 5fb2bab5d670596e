"""The recipe of a run, by the pretrained part of its model, and warnings about other recipes."""

import dataclasses

import pytest
import torch

from dino_hf import DinoDetrForObjectDetection
from dino_hf.run.recipe_choice import choose_recipe, unsuitable_recipe
from dino_hf.run.starting_model import Start, load_start
from dino_hf.training import get_recipe
from dino_hf.training.coco_data import CocoData
from helpers import tiny_config

DATA = CocoData(None, {0: "cat", 1: "dog", 2: "emu"}, [4, 9, 11])
ON_BACKBONE = "random weights, except the backbone of resnet"


def new_detector(**changes) -> DinoDetrForObjectDetection:
    return DinoDetrForObjectDetection(tiny_config(provenance={"start": ON_BACKBONE}, **changes))


def test_a_new_detector_is_trained_as_one_on_a_backbone():
    assert choose_recipe(None) == "from-backbone"


@pytest.mark.parametrize(
    ("provenance", "recipe", "pretrained"),
    [
        ({"start": ON_BACKBONE}, "from-backbone", "backbone"),
        ({"start": "random weights"}, "scratch", "nothing"),
        ({"license": "mit"}, "finetune", "detector"),
        (None, "finetune", "detector"),
        ({"start": ["random weights"]}, "finetune", "detector"),
    ],
)
def test_a_saved_detector_that_was_never_trained(tmp_path, provenance, recipe, pretrained):
    DinoDetrForObjectDetection(tiny_config(provenance=provenance)).save_pretrained(tmp_path)
    assert choose_recipe(tmp_path) == recipe
    start = load_start(tmp_path, DATA, seed=0)
    assert start.pretrained == pretrained
    if pretrained == "detector":
        assert start.source == str(tmp_path)
    else:
        assert str(tmp_path) in start.source
        assert start.notes == ["All 3 classes start from random weights"]
        assert start.model.config.provenance == {"start": provenance["start"]}


@pytest.mark.parametrize("which", [0, 1])
def test_one_changed_head_makes_a_trained_detector(tmp_path, which):
    model = new_detector()
    biases = [one for name, one in model.named_parameters() if name.endswith(".class_head.bias")]
    assert len(biases) == 2
    with torch.no_grad():
        biases[which][-1] += 1e-6
    model.save_pretrained(tmp_path)
    assert choose_recipe(tmp_path) == "finetune"


def test_damaged_weights_are_an_error_of_loading(tmp_path):
    new_detector().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert choose_recipe(tmp_path) == "finetune"
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        load_start(tmp_path, DATA, seed=0)


def test_a_detector_without_weights_is_trained_from_scratch(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert choose_recipe(tmp_path) == "scratch"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="config"):
        choose_recipe(tmp_path)


def start_of(pretrained: str, model=None) -> Start:
    source = {"detector": "birds", "backbone": ON_BACKBONE, "nothing": "random weights: no weights"}[pretrained]
    return Start(new_detector() if model is None else model, None, source, [])


@pytest.mark.parametrize(
    ("pretrained", "recipe"), [("detector", "finetune"), ("backbone", "from-backbone"), ("nothing", "scratch")]
)
def test_the_chosen_recipe_is_not_warned_of(pretrained, recipe):
    assert unsuitable_recipe(start_of(pretrained), get_recipe(recipe), 200) == []


@pytest.mark.parametrize("pretrained", ["backbone", "nothing"])
def test_rates_and_steps_that_are_too_low_for_random_weights(pretrained):
    def found(learning_rate: float, num_steps: int) -> list[str]:
        recipe = get_recipe("paper-12ep", learning_rate=learning_rate)
        return unsuitable_recipe(start_of(pretrained), recipe, num_steps)

    assert found(1e-4, 200) == []
    (low,) = found(9.9e-5, 200)
    assert "9.9e-05 is too low" in low
    assert {"backbone": "--recipe from-backbone", "nothing": "--recipe scratch"}[pretrained] in low
    (short,) = found(1e-4, 199)
    assert "only 199 steps" in short
    assert unsuitable_recipe(start_of("detector"), get_recipe("finetune"), 1) == []


@pytest.mark.parametrize("pretrained", ["detector", "backbone"])
def test_a_rate_that_is_too_high_for_a_pretrained_backbone(pretrained):
    recipe = get_recipe("paper-12ep", backbone_learning_rate=2e-4)
    assert unsuitable_recipe(start_of(pretrained), recipe, 500) == []
    (high,) = unsuitable_recipe(start_of(pretrained), dataclasses.replace(recipe, backbone_learning_rate=2.1e-4), 500)
    assert "0.00021 is so high" in high
    assert unsuitable_recipe(start_of("nothing"), get_recipe("scratch"), 500) == []


def test_many_random_weights_are_warned_of():
    class Counted:
        size = 10_000_000

        def num_parameters(self) -> int:
            return self.size

    model = Counted()
    assert unsuitable_recipe(start_of("nothing", model), get_recipe("scratch"), 500) == []
    model.size += 1
    assert unsuitable_recipe(start_of("backbone", model), get_recipe("from-backbone"), 500) == []
    (warning,) = unsuitable_recipe(start_of("nothing", model), get_recipe("scratch"), 500)
    assert "all 10 million parameters" in warning
