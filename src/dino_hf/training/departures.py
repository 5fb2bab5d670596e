"""Departures of a run from its published recipe, as readable lines, and `recipe.json`, which keeps them."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments

from ..common.output_folders import replace_file
from ..common.regular_files import read_settings
from .augmentation import Augmentation
from .optimizer import BETAS, EPS, images_per_step, planned_steps
from .recipe import LIMITS, TRAINER_FIELDS, Recipe
from .recipes import RECIPES

logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.json"


def find_departures(
    recipe: Recipe, args: TrainingArguments, config: PreTrainedConfig, num_train_images: int | None = None
) -> list[str]:
    """Differences between a run and the recipe of this name in `RECIPES`, one readable line each.

    A recipe with another name is compared with itself.

    Args:
        args: arguments of the run.
        config: configuration of the trained model.
        num_train_images: number of training images. Without it, epochs are not compared if `args.max_steps` is set.
    Returns:
        lines; an empty list if the run follows the recipe.
    """
    published = RECIPES.get(recipe.name, recipe)
    lines = _step_departures(recipe, published, args) + _length_departures(recipe, published, args, num_train_images)
    pairs = [
        ("weight_decay", args.weight_decay, published.weight_decay),
        ("max_grad_norm", args.max_grad_norm, published.max_grad_norm),
        ("adam_betas", (args.adam_beta1, args.adam_beta2), BETAS),
        ("adam_epsilon", args.adam_epsilon, EPS),
    ]
    for name in ("lr_scheduler", "lr_drop_epochs", "warmup_steps", "nms", *TRAINER_FIELDS):
        pairs.append((name, getattr(recipe, name), getattr(published, name)))
    for name, value in (LIMITS | published.model_settings).items():
        pairs.append((name, getattr(config, name), value))
    ours, theirs = recipe.augmentation, published.augmentation
    expected = _resized_alike(ours, theirs)
    if expected != theirs:
        lines.append(
            f"images are resized to at most {max(ours.short_sides)} (short side) and {ours.longest_side} pixels (long side), "
            f"and cropped in proportion, the recipe has {max(theirs.short_sides)} and {theirs.longest_side}"
        )
    for name, value in vars(expected).items():
        pairs.append((f"augmentation.{name}", getattr(ours, name), value))
    return lines + [_line(*pair) for pair in pairs if pair[1] != pair[2]]


def _resized_alike(ours: Augmentation, theirs: Augmentation) -> Augmentation:
    """The published augmentation resized to our sizes, if all our sizes follow from `Augmentation.resized`; else unchanged."""
    resized = theirs.resized(max(ours.short_sides), ours.longest_side)
    changed = [name for name, value in vars(resized).items() if value != getattr(theirs, name)]
    follows = "short_sides" in changed and all(getattr(ours, name) == getattr(resized, name) for name in changed)
    return resized if follows else theirs


def _step_departures(recipe: Recipe, published: Recipe, args: TrainingArguments) -> list[str]:
    """Differences of images per step and learning rates. They are compared together, because one is scaled by the other."""
    num_images, lines = images_per_step(args), []
    is_scaled = bool(recipe.scale_learning_rate) and math.isclose(
        args.learning_rate, recipe.learning_rate * recipe.learning_rate_scale(num_images)
    )
    if num_images != published.total_batch_size:
        linear = published.learning_rate * num_images / published.total_batch_size
        note = f"; {recipe.scale_learning_rate if is_scaled else 'no'} scaling of learning rates"
        note += "" if is_scaled else f", linear scaling would give {linear:g}"
        lines.append(_line("images per step", num_images, published.total_batch_size) + note)
    expected = published.learning_rates()
    for name, rate in recipe.learning_rates(args).items():
        if rate != expected[name]:
            lines.append(_line(name, rate, expected[name]))
    return lines


def _length_departures(
    recipe: Recipe, published: Recipe, args: TrainingArguments, num_train_images: int | None
) -> list[str]:
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        if num_train_images is None:
            return [f"max_steps {args.max_steps}, the recipe has {published.num_train_epochs:g} epochs"]
        epochs = args.max_steps / planned_steps(args, num_train_images)[1]
    lines = []
    if epochs != published.num_train_epochs:
        lines.append(_line("epochs", epochs, published.num_train_epochs))
    if late := [epoch for epoch in recipe.lr_drop_epochs if epoch >= epochs]:
        lines.append(f"the learning rate does not fall at epoch {_text(late)}: the run ends before")
    return lines


def _line(name: str, value: Any, expected: Any) -> str:
    return f"{name} {_text(value)}, the recipe has {_text(expected)}"


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value)) or "none"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def save_recipe(folder: Path, recipe: Recipe, departures: list[str], is_resumed: bool) -> None:
    """Write recipe and departures into `recipe.json` of a run, and log the departures as warnings.

    If the run is resumed with another recipe, the changed fields are logged too.
    """
    for line in departures:
        logger.warning("Departs from the recipe %s: %s", recipe.name, line)
    content = {"recipe": recipe.as_dict(), "departures": departures}
    path = folder / RECIPE_NAME
    if is_resumed and (before := _recorded_recipe(path)):
        changed = [name for name, value in content["recipe"].items() if before.get(name) != value]
        if changed:
            old, new = ({name: fields.get(name) for name in changed} for fields in (before, content["recipe"]))
            logger.warning("The resumed run had another recipe: %s. It continues with %s.", old, new)
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _recorded_recipe(path: Path) -> dict | None:
    """Recipe of the resumed run, for a comparison. None if its file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return dict(read_settings(path)["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s) and is written again. Changes of the recipe are not reported.", path, error)
        return None
