"""The recipe of a run, if the user chose none, and warnings about a recipe that does not fit the model."""

from pathlib import Path

from ..common.paths import expand_home
from ..inference.loading import fetch_published
from ..training.recipe import Recipe
from .starting_model import Start, check_kind, pretrained_part, untrained_source

RECIPES_BY_PRETRAINED = {"detector": "finetune", "backbone": "from-backbone", "nothing": "scratch"}
_LOWEST_RATE = 1e-4  # of random weights: the release's learning rate. Lower ones need more steps than small data give.
_HIGHEST_RATE = 2e-4  # of a pretrained backbone: ten times the published 2e-5
_FEWEST_STEPS = 200  # of random weights: on blood cells, AP was still rising steeply after 156 steps of 4 images
_LARGE = 10_000_000  # parameters. Larger models were not trained from random weights here.


def choose_recipe(model: str | Path | None) -> str:
    """The name of the recipe for the pretrained part of a model.

    Args:
        model: as in `train`. None: a new detector on a pretrained backbone.
    Raises:
        FileNotFoundError, OSError, ValueError: the model does not exist or is not a DINO detector.
    """
    if model is None:
        return RECIPES_BY_PRETRAINED["backbone"]
    folder = expand_home(fetch_published(model))
    check_kind(folder if folder.is_dir() else model)
    source = untrained_source(folder)
    return RECIPES_BY_PRETRAINED["detector" if source is None else pretrained_part(source)]


def unsuitable_recipe(start: Start, recipe: Recipe, num_steps: int) -> list[str]:
    """Warnings about learning rates and a number of steps that cannot train a model.

    Args:
        recipe: with the learning rates of the run.
        num_steps: optimizer steps of the whole run.
    """
    pretrained, warnings = start.pretrained, []
    remedy = f"--recipe {RECIPES_BY_PRETRAINED[pretrained]} is for this start"
    if pretrained != "detector":
        what = "random weights" if pretrained == "nothing" else "random weights, except the backbone"
        if recipe.learning_rate < _LOWEST_RATE:
            warnings.append(
                f"the detector starts from {what}, and the learning rate {recipe.learning_rate:g} is too low for them; {remedy}."
            )
        if num_steps < _FEWEST_STEPS:
            warnings.append(
                f"the detector starts from {what}, and the run has only {num_steps} steps: it will find little. Train more epochs "
                f"(--num-train-epochs), or start from a trained detector (--model)."
            )
    if pretrained == "nothing" and (size := start.model.num_parameters()) > _LARGE:
        warnings.append(
            f"all {size / 1e6:.0f} million parameters start from random weights: only much data and many epochs train a model of "
            "this size. Start from a trained detector (--model) or on a pretrained backbone (--backbone)."
        )
    if pretrained != "nothing" and recipe.backbone_learning_rate > _HIGHEST_RATE:
        warnings.append(
            f"the backbone is pretrained, and its learning rate {recipe.backbone_learning_rate:g} is so high that it forgets; "
            f"{remedy}."
        )
    return warnings
