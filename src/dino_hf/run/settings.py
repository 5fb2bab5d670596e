"""Settings of a run by name, from Python or a command line.

A setting is an argument of `train`, or a field of `Recipe`, of its `Augmentation` and `model_settings`, or of `TrainingArguments`.
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..common.values import numbers_by_name
from ..training.augmentation import Augmentation
from ..training.recipe import MODEL_SETTINGS, Recipe
from ..training.recipes import get_recipe

_ARGUMENTS = {argument.name for argument in dataclasses.fields(TrainingArguments) if argument.init}
_NOT_SETTINGS = {"name", "augmentation", "model_settings", "architecture"}
_RECIPE_SETTINGS = {field.name for field in dataclasses.fields(Recipe)} - _NOT_SETTINGS
_AUGMENTATION_SETTINGS = {field.name for field in dataclasses.fields(Augmentation)}
_NAMES = _ARGUMENTS | _RECIPE_SETTINGS | _AUGMENTATION_SETTINGS | MODEL_SETTINGS
# Arguments of `train` that `run.json` records, and their defaults. A resumed run keeps the recorded values.
RUN_DEFAULTS = {
    "recipe": None,  # by the pretrained part of the model
    "seed": 0,
    "validation_fraction": 0.2,
    "box_format": None,
    "report_to": None,  # TensorBoard, if it is installed
    "on_bad_image": "skip",
    "allow_outside": False,
    "trust_boxes": False,
    "training_doctor": True,
}
_TRAIN_ARGUMENTS = {
    *RUN_DEFAULTS,
    "model",
    "backbone",
    "num_queries",
    "freeze",
    "lora",
    "keep_classes",
    "old_data",
    "tiles",
    "tile_overlap",
    "empty_tiles",
    "augmentation",
    "output_dir",
    "resume",
    "batch_size",
    "dry_run",
    "check_images",
}
# Training arguments that a run sets itself, and what to use instead.
_FALLBACKS = {
    "output_dir": "--output-dir (in Python, output_dir) names the folder",
    "resume_from_checkpoint": "--resume (in Python, resume=True) continues from the newest checkpoint in the output folder",
    "per_device_train_batch_size": "--batch-size (in Python, batch_size) sets the images of a batch",
    "push_to_hub": "share the finished folder: dino-hf push FOLDER OWNER/NAME. During training, it would have no results",
}


def split_settings(recipe: str, settings: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """Split settings by name.

    Returns:
        the recipe with its changed fields; all other settings, for `recipe.training_arguments`.
    Raises:
        ValueError: there is no setting of this name, or the value is invalid.
    """
    for name in settings:
        if name in _FALLBACKS:
            raise ValueError(f"{name} is not set here: {_FALLBACKS[name]}.")
        if name not in _NAMES:
            raise ValueError(f"There is no setting {name!r}; {_closest(name)}")
    changes = {name: value for name, value in settings.items() if name in _RECIPE_SETTINGS}
    if in_model := {name: value for name, value in settings.items() if name in MODEL_SETTINGS}:
        changes["model_settings"] = in_model
    if in_augmentation := {name: value for name, value in settings.items() if name in _AUGMENTATION_SETTINGS}:
        changes["augmentation"] = dataclasses.replace(get_recipe(recipe).augmentation, **in_augmentation)
    others = {
        name: value for name, value in settings.items() if name not in _NAMES - _ARGUMENTS and name not in changes
    }
    return get_recipe(recipe, **changes), others


def flat_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as plain JSON. `augmentation` and `model_settings` are replaced by their fields.

    Raises:
        ValueError: a value is not plain JSON, so a run could not be resumed with it.
    """
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Augmentation):
            flat |= dataclasses.asdict(value)
        elif name == "model_settings" and isinstance(value, dict):
            flat |= value
        else:
            flat[name] = value
    for name, value in flat.items():
        if not _is_plain(value):
            raise ValueError(
                f"{name}={value!r} cannot be written to run.json, so the run could not be resumed. Use numbers, text, lists and "
                "dictionaries."
            )
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# The command line


class _Parser(HfArgumentParser):
    def error(self, message: str):
        """Raise the error. argparse would print all options and exit."""
        found = re.fullmatch(r"argument (?:\S+/)?(\S+): (.*)", message)
        sentence = f"{found[1]}: {found[2]}" if found else message
        if found and found[2] == "expected one argument":
            sentence = f"{found[1]} needs a value, as in {found[1]} true or {found[1]} 10"
        raise ValueError(f"{sentence.rstrip('.')}.")


def parse_settings(tokens: Sequence[str]) -> dict[str, Any]:
    """Parse the settings of a command line: `--learning-rate 1e-4 --bf16 --short-sides 480 512`.

    Hyphens and underscores are the same.

    Args:
        tokens: the command line without the options of the command itself.
    Returns:
        the given settings by name.
    Raises:
        ValueError: an unknown name, or a value of a wrong type.
    """
    parser = _Parser([TrainingArguments], allow_abbrev=False, add_help=False, prog="dino-hf train")
    for name in sorted(_NAMES - _ARGUMENTS):
        hint = _hint(name)
        parser.add_argument(
            f"--{name}", f"--{name.replace('_', '-')}", type=_plain, nargs="+" if "tuple" in hint else None
        )
    absent = object()  # argparse sets defaults only for attributes that the namespace lacks
    found, rest = parser.parse_known_args(list(tokens), argparse.Namespace(**dict.fromkeys(_NAMES, absent)))
    if rest:
        if rest[0].startswith("--"):
            name = rest[0].removeprefix("--").partition("=")[0].replace("-", "_")
            raise ValueError(f"There is no option {rest[0]}; {_closest(name, as_option=True)}")
        raise ValueError(f"{rest[0]!r} does not belong to an option; dino-hf train takes one data set.")
    settings = {name: value for name, value in vars(found).items() if value is not absent}
    for name, value in settings.items():
        if isinstance(value, list) and value == [None]:  # --scale-jitter none
            settings[name] = None
    if (nms := settings.get("nms")) in ("soft", "hard"):
        settings["nms"] = {"method": nms}
    if "=" in str(weights := settings.get("class_weights")):
        settings["class_weights"] = numbers_by_name(weights, "--class-weights", "bus=3,person=0.5: names and factors")
    return settings


def _hint(name: str) -> str:
    owner = Recipe if name in _RECIPE_SETTINGS else Augmentation
    return str(next((field.type for field in dataclasses.fields(owner) if field.name == name), ""))


def _plain(text: str) -> Any:
    """A number, None, True or False, or else the text itself. The recipe checks the type."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _closest(name: str, as_option: bool = False) -> str:
    names = sorted(
        (_NAMES - set(_FALLBACKS)) | _TRAIN_ARGUMENTS,
        key=lambda name: (name not in _TRAIN_ARGUMENTS | _RECIPE_SETTINGS, name),
    )
    # --lr, --epochs: initials, or one word of the name.
    matches = [
        setting for setting in names if name in (re.sub(r"(?<=[a-z])[a-z]+|_", "", setting), *setting.split("_"))
    ]
    matches += difflib.get_close_matches(name, names, n=3)
    close = list(dict.fromkeys(matches))[:3]
    if as_option:
        close = [f"--{setting.replace('_', '-')}" for setting in close]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "settings are the fields of Recipe, of its Augmentation, and of transformers.TrainingArguments."


# Trackers


def find_trackers(report_to: str | Sequence[str] | None) -> list[str]:
    """Check names of trackers, for `TrainingArguments.report_to`.

    Args:
        report_to: "none", one name or several names. None: TensorBoard, if it is installed.
    Raises:
        ValueError: an unknown tracker.
        ImportError: a tracker that is not installed.
    """
    if report_to is None:
        return [name for name in get_available_reporting_integrations() if name == "tensorboard"]
    names = list(dict.fromkeys([report_to] if isinstance(report_to, str) else report_to))
    if names in (["none"], []):
        return []
    if "none" in names:
        others = ", ".join(str(name) for name in names if name != "none")
        raise ValueError(f"report_to contains 'none' and {others}; remove 'none', or remove the others.")
    available = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            close = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else f"there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, none."
            )
            raise ValueError(f"There is no tracker {name!r}; {hint}")
        if name not in available:
            raise ImportError(f"The tracker {name} is not installed: pip install {name.replace('_', '-')}.")
    return names
