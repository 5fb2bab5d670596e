"""The arguments of a run: the recipe, adapted to model and data, and the steps of evaluations and checkpoints."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from ..common.values import short_repr
from ..data import DetectionData
from ..training.augmentation import Augmentation
from ..training.class_balance import images_per_epoch
from ..training.kept_classes import ClassGroups
from ..training.optimizer import planned_steps
from ..training.own_augmentation import OwnAugmentation
from ..training.recipe import Recipe
from .progress import BEST_AP

_MOST_WORKERS = 8


def adapt_recipe(recipe: Recipe, given: dict[str, Any], image_processor, has_evaluation: bool) -> Recipe:
    """Adapt a recipe to model and data.

    By default, training images get the sizes of the model's image processor, and large-scale jitter fills its canvas. Without
    held-out data, early stopping is off.

    Args:
        given: settings from the user.
    """
    size = image_processor.size
    if not given.keys() & {field.name for field in dataclasses.fields(Augmentation)} and "shortest_edge" in size:
        augmentation = recipe.augmentation.resized(size["shortest_edge"], size["longest_edge"])
        recipe = dataclasses.replace(recipe, augmentation=augmentation)
    side = getattr(image_processor, "canvas_side", None)
    if side is not None and recipe.augmentation.scale_jitter is not None and "jitter_size" not in given:
        recipe = dataclasses.replace(recipe, augmentation=dataclasses.replace(recipe.augmentation, jitter_size=side))
    if not has_evaluation:
        recipe = dataclasses.replace(recipe, early_stopping_patience=None)
    return recipe


class Plan(NamedTuple):
    """Inputs of the `TrainingArguments` of a run."""

    recipe: Recipe
    arguments: dict[str, Any]  # for TrainingArguments, without batch sizes
    output_dir: Path
    splits: DetectionData
    augmentation: OwnAugmentation | None = None  # of the user
    groups: ClassGroups | None = None  # classes of a run that keeps old classes

    def training_arguments(self, batch_size: int = 1, accumulation: int = 1) -> TrainingArguments:
        """Arguments for a batch size per process and a number of accumulated batches. The user's settings replace both.

        Raises:
            ValueError: a setting is invalid.
        """
        settings = {
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "save_total_limit": 2,
            "disable_tqdm": True,
            # Without this, processes on CPUs would not connect, and half precision would be refused.
            "use_cpu": not torch.accelerator.is_available(),
            **_strategies(self.arguments, self.splits.validation is not None),
        } | self.arguments
        if settings.get("max_steps") == 0:  # Trainer would do one step
            raise ValueError(
                "max_steps=0 trains nothing. Leave it out to train num_train_epochs, or set a number of steps."
            )
        accumulation, workers = settings["gradient_accumulation_steps"], settings.get("dataloader_num_workers")
        if isinstance(accumulation, int) and accumulation < 1:
            raise ValueError(f"gradient_accumulation_steps={accumulation} must be at least 1; 1 does not accumulate.")
        if isinstance(workers, int) and workers < 0:
            raise ValueError(
                f"dataloader_num_workers={workers} must be at least 0; 0 reads images in the training process."
            )
        try:
            args = self.recipe.training_arguments(str(self.output_dir), **settings)
            planned = planned_steps(args, images_per_epoch(self.splits.train, self.recipe.repeat_threshold))
        except (TypeError, OverflowError) as error:  # values from Python or run.json were not checked before
            raise ValueError(
                f"One of the settings {short_repr(self.arguments)} has a value of a wrong type: {error}."
            ) from error
        if "logging_steps" not in self.arguments:  # epochs of small data sets are short
            args.logging_steps = min(20, *planned)
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # only speeds up copies to a GPU
        elif "dataloader_num_workers" not in self.arguments:
            args.dataloader_num_workers = min(_MOST_WORKERS, _usable_cores() // processes_here(args))
            args.dataloader_persistent_workers = args.dataloader_num_workers > 0
        return args


def _usable_cores() -> int:
    """Number of cores of this process. A container or a scheduler may limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes_here(args: TrainingArguments) -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))


def _strategies(given: dict[str, Any], has_evaluation: bool) -> dict[str, Any]:
    """Arguments for evaluations and checkpoints. Both happen at the same steps, so that the best weights are saved.

    Raises:
        ValueError: the given settings ask for different steps.
    """
    steps = given.get("eval_steps", given.get("save_steps"))
    default = "epoch" if steps is None else "steps"
    saved = given.get("save_strategy", given.get("eval_strategy", default))
    evaluated = given.get("eval_strategy", saved if has_evaluation else "no")
    if saved not in ("epoch", "steps") or evaluated != (saved if has_evaluation else "no"):
        raise ValueError(
            f"eval_strategy={evaluated!r} and save_strategy={saved!r}: a run evaluates and saves at the same steps, after each "
            "epoch or every --eval-steps. Leave both out, or make them equal."
        )
    settings = {"eval_strategy": evaluated, "save_strategy": saved}
    if steps is not None:
        if saved != "steps" or given.get("save_steps", steps) != steps:
            raise ValueError(
                f"eval_steps={given.get('eval_steps')}, save_steps={given.get('save_steps')}, save_strategy={saved!r}: a run "
                "evaluates and saves at the same steps. Set only eval_steps."
            )
        settings |= {"eval_steps": steps, "save_steps": steps}
    if has_evaluation:
        metric = given.get("metric_for_best_model", BEST_AP)
        settings |= {"metric_for_best_model": metric, "greater_is_better": not metric.endswith("loss")}
        settings["load_best_model_at_end"] = True
    return settings
