"""Keep the best score thresholds of an evaluation in the configuration of the model, where `dino_hf.predict` finds them."""

import json
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..common.output_folders import check_writable, replace_file
from ..common.paths import expand_home
from ..common.regular_files import read_settings
from ..inference.predictor import Predictor
from ..model.configuration_dino_detr import DinoDetrConfig
from .result import Evaluation

# A class needs this many objects to get a threshold of its own: with fewer, its best threshold is mostly noise (docs/log.md).
MIN_OBJECTS = 50


def best_thresholds(evaluation: Evaluation) -> tuple[float | None, dict[str, float]]:
    """The thresholds with the best F1, as `DinoDetrConfig.set_thresholds` takes them.

    Returns:
        the threshold for all classes, None if no object was found; and the thresholds of the classes that have at least
        `MIN_OBJECTS` objects, by the model's name of the class.
    """
    if evaluation.best is None:
        return None, {}
    own = {
        row["category_id"]: row["best_threshold"]
        for row in evaluation.per_class
        if row["best_threshold"] is not None and row["num_objects"] >= MIN_OBJECTS
    }
    by_class = {name: own[category] for name, category in evaluation.model_classes.items() if category in own}
    return evaluation.best.threshold, by_class


def check_keeps_thresholds(model: str | Path | PreTrainedModel | Predictor, split: str, allow_trained: bool) -> None:
    """Check, before the evaluation, that `keep_thresholds` can change a model.

    Raises:
        ValueError: the model has no folder on this machine or is not a DINO detector, or the images may be training images.
        OSError: the folder cannot be written.
    """
    if split == "train" or allow_trained:
        setting = f"split {split}" if split == "train" else "allow_trained"
        raise ValueError(
            f"keep_threshold is not possible with {setting}: scores of training images are too high, and so is a threshold that is "
            "measured on them."
        )
    if isinstance(model, Predictor):
        model = model.model
    if isinstance(model, PreTrainedModel):
        _check_type(model.config.model_type, type(model).__name__)
        return
    folder = expand_home(model)
    if not folder.is_dir():
        raise ValueError(
            f"keep_threshold changes the configuration in the folder of a model, but {model} is no folder on this machine; save "
            "the model in a folder first, or use the threshold with predict --threshold."
        )
    if (folder / CONFIG_NAME).is_file():  # otherwise loading the model says what is missing
        _check_type(read_settings(folder / CONFIG_NAME).get("model_type"), str(model))
    check_writable(folder)


def keep_thresholds(evaluation: Evaluation, predictor: Predictor, folder: str | Path | None = None) -> str:
    """Write the best thresholds into the configuration of a model, and into `config.json` in its folder.

    Args:
        predictor: it was evaluated. Its model's configuration is changed.
        folder: the folder that the model was loaded from. All other settings in its `config.json` stay as they are. None: no file
            is changed.
    Returns:
        a sentence for the user.
    Raises:
        ValueError: the model is not a DINO detector, or no object was found, so there is no threshold.
        OSError: the file cannot be written. Then it is unchanged.
    """
    config = predictor.model.config
    _check_type(config.model_type, predictor.name)
    threshold, by_class = best_thresholds(evaluation)
    if threshold is None:
        raise ValueError(f"{predictor.name} found no object, so there is no best threshold to keep.")
    if folder is not None:
        path = expand_home(folder) / CONFIG_NAME
        settings = read_settings(path) | {"score_threshold": threshold, "class_score_thresholds": by_class or None}
        with replace_file(path) as scratch:
            scratch.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config.set_thresholds(threshold, by_class)
    where = "the configuration" if folder is None else str(Path(folder, CONFIG_NAME))
    count = len(by_class)
    own = (
        f", and {count} class{'' if count == 1 else 'es'} with at least {MIN_OBJECTS} objects have their own"
        if count
        else ""
    )
    return f"The threshold {threshold:.3f} is kept in {where} as the default of predict{own}."


def _check_type(model_type: str | None, name: str) -> None:
    if model_type != DinoDetrConfig.model_type:
        raise ValueError(
            f"{name} is a model of type {model_type!r:.100}, whose configuration has no score threshold; use predict --threshold."
        )
