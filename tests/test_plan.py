"""The recipe of a run, adapted to model and data."""

import pytest

from dino_hf import DinoDetrImageProcessor
from dino_hf.run.plan import adapt_recipe
from dino_hf.training import Augmentation, get_recipe

CANVAS = {"size": {"shortest_edge": 72, "longest_edge": 72}, "canvas_value": 114}
JITTER = Augmentation(scale_jitter=(0.5, 2.0), jitter_size=640)


@pytest.mark.parametrize(
    ("processor", "given", "expected"),
    [(CANVAS, {}, 72), (CANVAS, {"jitter_size": 640}, 640), ({}, {"scale_jitter": (0.5, 2.0)}, 640)],
    ids=["canvas", "canvas and a size from the user", "no canvas"],
)
def test_jitter_has_the_size_of_the_canvas_unless_the_user_names_one(processor, given, expected):
    recipe = get_recipe("finetune", augmentation=JITTER)
    adapted = adapt_recipe(recipe, {"scale_jitter": (0.5, 2.0)} | given, DinoDetrImageProcessor(**processor), True)
    assert adapted.augmentation.jitter_size == expected
