"""Hyperparameter search with `DinoDetrTrainer`: what may be searched, and the objective."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainingArguments

from .recipe import SET_BY_RECIPE

_ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def checked_space(space: Callable[[Any], Mapping[str, Any]], trial: Any) -> Mapping[str, Any]:
    """The values of a trial.

    Raises:
        ValueError: a value would have no effect.
    """
    values = space(trial)
    for name in values:
        if name in SET_BY_RECIPE or name not in _ARGUMENTS:
            owner = "is set by the recipe" if name in SET_BY_RECIPE else "is not a field of TrainingArguments"
            raise ValueError(
                f"hp_space returns {name}, which {owner}, so it would have no effect. Search fields such as learning_rate, "
                "weight_decay, num_train_epochs and per_device_train_batch_size."
            )
    return values


def highest_ap(metrics: Mapping[str, float], prefix: str = "eval") -> float:
    """AP of the own or of the averaged weights, whichever is higher.

    Args:
        prefix: of the metrics of the first held-out data set.
    Raises:
        ValueError: there is no AP.
    """
    scores = [metrics[name] for name in (f"{prefix}_AP", f"{prefix}_ema_AP") if name in metrics]
    if not scores:
        raise ValueError(f"The evaluation has no {prefix}_AP: give compute_objective, or held-out data as CocoData.")
    return max(scores)
