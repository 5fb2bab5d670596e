"""The arguments of a run: the recipe, fitted to model and data, and when it evaluates and saves."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from ..common.values import short_repr
from ..data import DetectionData
from ..training.augmentation import Augmentation
from ..training.optimizer import planned_steps
from ..training.recipe import Recipe
from .progress import BEST_AP

_MOST_WORKERS = 8


def fitted(recipe: Recipe, given: dict[str, Any], image_processor, has_evaluation: bool) -> Recipe:
    """To the size of images that the model predicts on, unless sizes are given; and to data of which none are held out."""
    size = image_processor.size
    if not given.keys() & {field.name for field in dataclasses.fields(Augmentation)} and "shortest_edge" in size:
        augmentation = recipe.augmentation.resized(size["shortest_edge"], size["longest_edge"])
        recipe = dataclasses.replace(recipe, augmentation=augmentation)
    if not has_evaluation:
        recipe = dataclasses.replace(recipe, early_stopping_patience=None)
    return recipe


class Plan(NamedTuple):
    """What `TrainingArguments` are made of."""

    recipe: Recipe
    arguments: dict[str, Any]  # for TrainingArguments, but for the sizes of batches
    output_dir: Path
    splits: DetectionData

    def training_arguments(self, batch_size: int = 1, accumulation: int = 1) -> TrainingArguments:
        settings = {
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "save_total_limit": 2,
            "disable_tqdm": True,
            # Else processes on CPUs would not find each other, and half precision would be refused.
            "use_cpu": not torch.accelerator.is_available(),
            **_strategies(self.arguments, self.splits.validation is not None),
        } | self.arguments
        if settings.get("max_steps") == 0:  # Trainer would make one step
            raise ValueError(
                "max_steps=0 trains nothing; leave it out to train num_train_epochs, or give a number of steps."
            )
        accumulation, workers = settings["gradient_accumulation_steps"], settings.get("dataloader_num_workers")
        if isinstance(accumulation, int) and accumulation < 1:
            raise ValueError(
                f"gradient_accumulation_steps={accumulation} must be at least 1, which accumulates nothing."
            )
        if isinstance(workers, int) and workers < 0:
            raise ValueError(
                f"dataloader_num_workers={workers} must be at least 0, which reads images in the training process."
            )
        try:
            args = self.recipe.training_arguments(str(self.output_dir), **settings)
            planned = planned_steps(args, len(self.splits.train.dataset))
        except (TypeError, OverflowError) as error:  # of values from Python or a record, which nothing has looked at
            raise ValueError(
                f"One of the settings {short_repr(self.arguments)} has a value of a wrong type: {error}."
            ) from error
        if "logging_steps" not in self.arguments:  # epochs of small data sets are short
            args.logging_steps = min(20, *planned)
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # there is nothing to copy to
        elif "dataloader_num_workers" not in self.arguments:
            args.dataloader_num_workers = min(_MOST_WORKERS, _usable_cores() // processes_here(args))
            args.dataloader_persistent_workers = args.dataloader_num_workers > 0
        return args


def _usable_cores() -> int:
    """Cores that this process may run on: a container or a scheduler may give it some of those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes_here(args: TrainingArguments) -> int:
    """Processes of the run on this machine; of several machines, each has its own cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))


def _strategies(given: dict[str, Any], has_evaluation: bool) -> dict[str, Any]:
    """When a run evaluates and saves: always at the same steps, so that the best weights are there in the end.

    Raises:
        ValueError: something else is wanted.
    """
    steps = given.get("eval_steps", given.get("save_steps"))
    default = "epoch" if steps is None else "steps"
    saved = given.get("save_strategy", given.get("eval_strategy", default))
    evaluated = given.get("eval_strategy", saved if has_evaluation else "no")
    if saved not in ("epoch", "steps") or evaluated != (saved if has_evaluation else "no"):
        raise ValueError(
            f"eval_strategy={evaluated!r} and save_strategy={saved!r}: a run saves what it evaluates, after each epoch or after "
            "each --eval-steps; leave both out, or make them equal."
        )
    settings = {"eval_strategy": evaluated, "save_strategy": saved}
    if steps is not None:
        if saved != "steps" or given.get("save_steps", steps) != steps:
            raise ValueError(
                f"eval_steps={given.get('eval_steps')}, save_steps={given.get('save_steps')}, save_strategy={saved!r}: a run saves "
                "what it evaluates; give eval_steps alone."
            )
        settings |= {"eval_steps": steps, "save_steps": steps}
    if has_evaluation:
        metric = given.get("metric_for_best_model", BEST_AP)
        settings |= {"metric_for_best_model": metric, "greater_is_better": not metric.endswith("loss")}
        settings["load_best_model_at_end"] = True
    return settings
