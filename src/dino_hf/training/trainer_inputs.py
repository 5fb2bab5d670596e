"""Inputs of `DinoDetrTrainer`: data sets, image processor and parts from the user, checked for contradictions."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..data.rows import CocoData
from ..evaluation.evaluator import CocoEvaluator
from .coco_data import DetectionCollator, DetectionTransform, pad_labels
from .large_images import ReadLock, lock_large_images
from .recipe import Recipe


@dataclass
class TrainerInputs:
    """The data of a trainer, and the parts that replace parts of the recipe.

    Args:
        train: training data as `CocoData`, or rows that the user has prepared.
        held_out: held-out data by name, in the same forms. A single data set has the name "".
        image_processor: prepares the images of `CocoData`.
        replaced: name of an argument of the user -> the value that it has in place of the recipe's.
    """

    train: Any
    held_out: dict[str, Any]
    image_processor: Any
    replaced: dict[str, Any]

    @property
    def coco_train(self) -> CocoData | None:
        """The training data, or None if the user has prepared rows."""
        return self.train if isinstance(self.train, CocoData) else None

    @property
    def coco_held_out(self) -> dict[str, CocoData]:
        """Held-out data sets without rows that the user has prepared."""
        return {name: data for name, data in self.held_out.items() if isinstance(data, CocoData)}

    def evaluators(self, max_detections: int | None) -> dict[str, CocoEvaluator]:
        """The evaluator of each held-out `CocoData`."""
        return {
            name: CocoEvaluator(data, self.image_processor, max_detections) for name, data in self.coco_held_out.items()
        }

    def metrics(self, evaluators: Mapping[str, CocoEvaluator]) -> dict[str, tuple[Callable | None, Callable | None]]:
        """`compute_metrics` and `preprocess_logits_for_metrics` of each held-out data set. What the user gave comes first."""
        own = self.replaced.get("compute_metrics"), self.replaced.get("preprocess_logits_for_metrics")
        pairs = {}
        for name in self.held_out:
            evaluator = evaluators.get(name)
            ours = (None, None) if evaluator is None else (evaluator, evaluator.keep_top)
            pairs[name] = tuple(given or default for given, default in zip(own, ours, strict=True))
        return pairs

    def rows(self, train_transform: DetectionTransform) -> tuple[Any, Any]:
        """`train_dataset` and `eval_dataset` for `Trainer`."""
        lock, transform = ReadLock(), DetectionTransform(self.image_processor)

        def prepared(data: Any, with_transform: DetectionTransform) -> Any:
            if not isinstance(data, CocoData):
                return data
            return lock_large_images(data.dataset.with_transform(with_transform), data, lock)

        held_out = {name: prepared(data, transform) for name, data in self.held_out.items()}
        return prepared(self.train, train_transform), held_out.get("", held_out or None)

    def collator(self) -> Callable:
        own = self.replaced.get("data_collator")
        return DetectionCollator() if own is None else PaddedLabels(own)

    def departures(self, recipe: Recipe) -> list[str]:
        """Lines about the parts of the recipe that the user has replaced."""
        ours = {
            "data_collator": "DetectionCollator",
            "compute_metrics": "CocoEvaluator",
            "preprocess_logits_for_metrics": "CocoEvaluator.keep_top",
            "optimizer": "AdamW",
            "schedule": recipe.lr_scheduler,
        }
        lines = [
            f"{name} {_name(self.replaced[name])}, the recipe has {ours[name]}"
            for name in ours
            if name in self.replaced
        ]
        if self.coco_train is None:
            lines.append("training images are prepared by train_dataset, so the augmentation of the recipe is not used")
        return lines


class PaddedLabels:
    """A collator of a user, with its labels as padded tensors: `Trainer` cannot gather lists of dictionaries."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, samples: list) -> Any:
        batch = self.collator(samples)
        if isinstance(labels := batch.get("labels"), Sequence):
            batch["labels"] = pad_labels(labels)
        return batch


def read_inputs(
    *,
    model: Any,
    args: TrainingArguments | None,
    recipe: Recipe | None,
    train: Any,
    held_out: Any,
    image_processor: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    model_init: Any,
    compute_loss_func: Any,
    optimizers: tuple,
    optimizer_cls_and_kwargs: tuple | None,
    **parts: Any,
) -> TrainerInputs:
    """Check the arguments of a trainer.

    Args:
        parts: arguments that replace a part of the recipe, if they are not None.
    Raises:
        ValueError: arguments are missing, or contradict each other.
    """
    for name, value in (("args", args), ("recipe", recipe)):
        if value is None:
            raise ValueError(
                f"{name} is missing: DinoDetrTrainer(model, recipe.training_arguments(...), recipe=recipe, ...)."
            )
    if (model is None) == (model_init is None):
        which = "neither is given" if model is None else "both are given"
        raise ValueError(
            f"Training needs either model or model_init, a function that returns a new model, but {which}."
        )
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func gets outputs of a model that has not seen the labels, so there would be no denoising. Set "
            "model.loss_function in place of it."
        )
    if recipe is not None and optimizer_cls_and_kwargs is not None and optimizers[0] is not None:
        raise ValueError("optimizers and optimizer_cls_and_kwargs both choose the optimizer; leave one of them out.")
    if model_init is not None and any(one is not None for one in optimizers):
        raise ValueError(
            "optimizers hold the parameters of one model, but model_init makes a new model for each training. Use "
            "optimizer_cls_and_kwargs in place of optimizers."
        )
    train = _either("train", train, "train_dataset", train_dataset)
    if train is None:
        raise ValueError("The training data are missing: give train=load_coco(...), or your own train_dataset.")
    held_out = _either("held_out", held_out, "eval_dataset", eval_dataset)
    image_processor = _either("image_processor", image_processor, "processing_class", processing_class)
    if image_processor is None:
        raise ValueError("image_processor is missing: it prepares the images, and is saved with the model.")
    sets = {} if held_out is None else dict(held_out) if isinstance(held_out, Mapping) else {"": held_out}
    optimizer = optimizers[0] if optimizer_cls_and_kwargs is None else optimizer_cls_and_kwargs[0]
    parts |= {"optimizer": optimizer, "schedule": optimizers[1]}
    replaced = {name: value for name, value in parts.items() if value is not None}
    inputs = TrainerInputs(train, sets, image_processor, replaced)
    _check_own_rows(inputs, recipe)
    _check_metrics(replaced.get("compute_metrics"), args)
    return inputs


def _either(name: str, value: Any, stock_name: str, stock_value: Any) -> Any:
    if value is not None and stock_value is not None and value is not stock_value:
        raise ValueError(f"{name} and {stock_name} mean the same argument, and both are given; leave one of them out.")
    return stock_value if value is None else value


def _check_own_rows(inputs: TrainerInputs, recipe: Recipe) -> None:
    if inputs.coco_train is not None:
        return
    needs_boxes = [name for name in ("repeat_threshold", "class_weights") if getattr(recipe, name) is not None]
    if needs_boxes:
        raise ValueError(
            f"{needs_boxes[0]} of the recipe counts the boxes of each class, but train_dataset has rows that are prepared "
            "already. Give the data as train=load_coco(...), or leave out this field."
        )


def _check_metrics(compute_metrics: Callable | None, args: TrainingArguments) -> None:
    """With `batch_eval_metrics`, `Trainer` calls the function for each batch and says whether it is the last."""
    if compute_metrics is None or not args.batch_eval_metrics:
        return
    parameters = inspect.signature(compute_metrics).parameters
    is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "compute_result" not in parameters and not is_open:
        raise ValueError(
            f"{_name(compute_metrics)} takes no compute_result, but batch_eval_metrics=True calls it after each batch. Write "
            "compute_metrics(prediction, compute_result), or use recipe.training_arguments(batch_eval_metrics=False)."
        )


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
