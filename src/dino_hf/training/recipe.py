"""`Recipe`: the settings of a training, and the objects that `Trainer` needs for them."""

import copy
import dataclasses
import difflib
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments

from ..common.values import is_number
from ..model.nms import read_nms
from .augmentation import Augmentation
from .class_balance import check_class_weights
from .optimizer import adamw, images_per_step, make_scheduler, parameter_groups, planned_steps

# Values in the release's launch scripts. Its configuration files and the paper's table have a box noise of 0.4.
RELEASE_SETTINGS = {
    "num_denoising": 100,
    "label_noise_ratio": 0.5,
    "box_noise_scale": 1.0,
    "class_cost": 2.0,
    "bbox_cost": 5.0,
    "giou_cost": 2.0,
    "cls_loss_coefficient": 1.0,
    "bbox_loss_coefficient": 5.0,
    "giou_loss_coefficient": 2.0,
    "focal_alpha": 0.25,
}
# Variants of DINO differ in these settings. The recipes for any detector leave them out, so the model keeps its own values.
DINO_LOSS = {
    "class_loss": "focal",
    "queries_per_box": 1,
    "denoising_cls_loss_coefficient": None,
    "negative_noise_start": 1.0,
}
# Settings that bound memory. A recipe may set them; otherwise they stay as they are in the model's configuration.
LIMITS = {"max_denoising_queries": None, "mask_denoising_padding": False}
MODEL_SETTINGS = {*RELEASE_SETTINGS, *DINO_LOSS, *LIMITS}
# Fields that only DinoDetrTrainer reads.
TRAINER_FIELDS = (
    "ema_decay",
    "ema_warmup_steps",
    "early_stopping_patience",
    "normalize_over_window",
    "on_non_finite",
    "repeat_threshold",
    "class_weights",
)

_SCHEDULERS = {
    "step": "constant_with_warmup",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}  # Trainer's names
_ARGUMENTS = {argument.name for argument in dataclasses.fields(TrainingArguments) if argument.init}
_CHECKPOINTING = "activation" if "activation_checkpointing" in _ARGUMENTS else "gradient"
# Arguments that a recipe replaces. Given as arguments, they would have no effect.
SET_BY_RECIPE = (
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
)


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained, as data. The methods build what `Trainer` needs.

    The defaults are the settings of the original release on COCO (DINO app. D.3). They are the same for R50 and Swin-L, which
    differ only in the frozen stages of the backbone, see `DinoDetrConfig.num_frozen_backbone_stages`. A recipe does not change the
    architecture, the classes or the frozen parts of a model.

    Args:
        name: a key of `RECIPES`. `find_departures` compares a run with the recipe of this name there.
        num_train_epochs: passes over the training data.
        lr_scheduler: "step", "cosine" (to zero at the last step) or "constant".
        lr_drop_epochs: for "step": epochs after which the learning rates fall to a tenth. They may be fractions.
        warmup_steps: number of steps in which the learning rates rise linearly; below 1, a share of all steps.
        learning_rate: learning rate of all parameters without their own learning rate.
        backbone_learning_rate: learning rate of the backbone without the projections of its feature maps.
        sampling_offsets_learning_rate: learning rate of the linear layers that predict the sampling points of deformable
            attention. None: `learning_rate`, as in the release. Deformable DETR uses a tenth of it.
        weight_decay: weight decay of AdamW for every parameter.
        max_grad_norm: the gradient of a step is clipped to this norm. 0: no clipping.
        total_batch_size: images per optimizer step, over all processes and accumulated batches, for which the learning rates are
            chosen. It does not change the run, but departures from it are reported. See `accumulation_for`.
        scale_learning_rate: None: the learning rates do not depend on the images per step. "linear": they are multiplied by the
            ratio of the images per step to `total_batch_size`; "sqrt": by the square root of this ratio.
        model_settings: fields of `DinoDetrConfig` -> value, for fields that hold no parameters, see `configure`.
        architecture: fields of `DinoDetrConfig` for a new detector: `train` uses them if it builds one on a backbone. Detectors
            that are loaded keep their architecture.
        nms: non-maximum suppression of detections with which the recipe was published, see `read_nms`. `train` sets it in the
            image processor if the processor has none, or if the user chose it.
        augmentation: augmentation of training images.
        ema_decay: decay of an exponential moving average of the weights. None: no average.
        ema_warmup_steps: the decay at a step is `ema_decay` * (1 - exp(-step / ema_warmup_steps)). 0: it is `ema_decay`.
        early_stopping_patience: training ends after this many evaluations in a row without a better AP. None: train to
            the end.
        normalize_over_window: with gradient accumulation, divide losses by the number of boxes in all batches of a step, as if they
            were one batch. False: divide the loss of each batch by its own boxes.
        on_non_finite: "raise": stop if predictions, loss or gradient are not finite. "skip": skip this step.
        repeat_threshold: images with rare classes are repeated in each epoch, by max(1, sqrt(repeat_threshold / share of images
            with the class)), see `RepeatFactorSampler`. None: each epoch has each image once.
        class_weights: factors of the class loss of matched queries, by the class of their target: "balanced", or a dictionary of
            class names and factors, see `class_weights`. None: all classes have the same weight.

    Raises:
        ValueError: an invalid value. The message names it and the valid ones.
    """

    name: str
    num_train_epochs: float
    lr_scheduler: str = "step"
    lr_drop_epochs: tuple[float, ...] = ()
    warmup_steps: float = 0
    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    sampling_offsets_learning_rate: float | None = None
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.1
    total_batch_size: int = 16
    scale_learning_rate: str | None = None
    model_settings: dict[str, Any] = field(default_factory=lambda: RELEASE_SETTINGS | DINO_LOSS)
    architecture: dict[str, Any] = field(default_factory=dict)
    nms: dict[str, Any] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    ema_decay: float | None = None
    ema_warmup_steps: int = 0
    early_stopping_patience: int | None = None
    normalize_over_window: bool = True
    on_non_finite: str = "raise"
    repeat_threshold: float | None = None
    class_weights: str | dict[str, float] | None = None

    def __post_init__(self):
        _check_types(self)
        _check_ranges(self)
        object.__setattr__(self, "lr_drop_epochs", tuple(self.lr_drop_epochs))  # a list, if read from JSON
        if bool(self.lr_drop_epochs) != (self.lr_scheduler == "step"):
            raise ValueError(
                f"lr_drop_epochs={self.lr_drop_epochs} do not go with lr_scheduler={self.lr_scheduler!r}: a step schedule drops "
                "at least once, e.g. lr_drop_epochs=(11,), and the others never, lr_drop_epochs=()."
            )
        if unknown := sorted(set(self.model_settings) - MODEL_SETTINGS, key=str):
            raise ValueError(
                f"model_settings has {unknown}, which cannot be changed in a built model. These can: {sorted(MODEL_SETTINGS)}."
            )

    def as_dict(self) -> dict:
        """All fields, as plain JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    # For Trainer

    def training_arguments(self, output_dir: str, **arguments) -> TrainingArguments:
        """Arguments for `Trainer` from the recipe, with an evaluation and a checkpoint after each epoch.

        Args:
            arguments: fields of `TrainingArguments`; they replace the recipe's values. The default batch size is 2 images per
                process without accumulation. `learning_rate` also changes the rates of backbone and sampling offsets, by the same
                factor; to change only one, change the recipe. `activation_checkpointing` and its older name
                `gradient_checkpointing` work in every version of transformers.
        Raises:
            ValueError: `TrainingArguments` does not have this field, or only the recipe can change it.
        """
        arguments = {
            re.sub("^(activation|gradient)(?=_checkpointing)", _CHECKPOINTING, name): value
            for name, value in arguments.items()
        }
        self._check_arguments(arguments)
        settings = {
            "num_train_epochs": self.num_train_epochs,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": _SCHEDULERS[self.lr_scheduler],
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "remove_unused_columns": False,  # the transform needs the image column
            "batch_eval_metrics": True,  # memory of an evaluation does not grow with its batches
            "logging_steps": 20,  # epochs of small data sets are short
            "ddp_find_unused_parameters": False,  # every trained parameter gets a gradient in every step
            "restore_callback_states_from_checkpoint": True,
        } | arguments
        evaluated = settings["eval_strategy"] != "no" and settings["eval_strategy"] == settings["save_strategy"]
        if self.early_stopping_patience is not None and evaluated:
            best = {"load_best_model_at_end": True, "metric_for_best_model": "AP", "greater_is_better": True}
            settings = best | settings
        args = TrainingArguments(output_dir=str(output_dir), **settings)
        if self.scale_learning_rate:
            args.learning_rate = self.learning_rate * self.learning_rate_scale(images_per_step(args))
        return args

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        for name in arguments:
            if name in SET_BY_RECIPE:
                raise ValueError(
                    f"{name} is set by the recipe, which trains with AdamW: change its schedule by get_recipe({self.name!r}, "
                    "lr_scheduler=..., warmup_steps=...). For another optimizer, use the stock Trainer(optimizers=...)."
                )
            if name not in _ARGUMENTS:
                close = difflib.get_close_matches(name, _ARGUMENTS, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else "see transformers.TrainingArguments."
                raise ValueError(f"There is no training argument {name!r}; {hint}")
        if self.scale_learning_rate and "learning_rate" in arguments:
            raise ValueError(
                f"learning_rate={arguments['learning_rate']} is given and scale_learning_rate={self.scale_learning_rate!r} would "
                "change it; leave one of them out."
            )

    def learning_rate_scale(self, num_images: int) -> float:
        """Factor of all learning rates for a number of images per step, by `scale_learning_rate`."""
        ratio = num_images / self.total_batch_size
        return {None: 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.scale_learning_rate]

    def accumulation_for(self, per_device_batch_size: int, world_size: int = 1) -> int:
        """`gradient_accumulation_steps` that give `total_batch_size` images per step.

        Raises:
            ValueError: `total_batch_size` is not a multiple of the images of a batch in all processes.
        """
        at_once = per_device_batch_size * world_size
        if self.total_batch_size % at_once:
            raise ValueError(
                f"The recipe {self.name!r} uses {self.total_batch_size} images per step, which is not a multiple of {at_once} "
                f"({per_device_batch_size} images in each of {world_size} processes); use a batch size that divides it."
            )
        return self.total_batch_size // at_once

    def learning_rates(self, args: TrainingArguments | None = None) -> dict[str, float | None]:
        """The three learning rates by field name, multiplied by `args.learning_rate` / `learning_rate`."""
        # One factor for all: without a change it is exactly 1, and rates stay the same bit by bit.
        factor = 1.0 if args is None else args.learning_rate / self.learning_rate
        names = ("learning_rate", "backbone_learning_rate", "sampling_offsets_learning_rate")
        rates = {name: getattr(self, name) for name in names}
        return {name: None if rate is None else rate * factor for name, rate in rates.items()}

    def make_optimizer(self, model: nn.Module, args: TrainingArguments | None = None) -> torch.optim.AdamW:
        """AdamW for a configured model that is on its device and has its frozen parts.

        Args:
            args: from `training_arguments`; their learning rate, weight decay, betas and epsilon are used. None: the recipe's.
        Raises:
            ValueError: `scale_learning_rate` is set, but `args`, which have the batch size, are missing.
        """
        if self.scale_learning_rate and args is None:
            raise ValueError(
                f"scale_learning_rate={self.scale_learning_rate!r} needs the images per step: pass args from training_arguments."
            )
        groups = parameter_groups(model, **self.learning_rates(args))
        if args is None:
            return adamw(groups, self.weight_decay)
        return adamw(groups, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)

    def make_scheduler(
        self, optimizer: torch.optim.Optimizer, num_training_steps: int, steps_per_epoch: float
    ) -> LambdaLR:
        """Schedule of the learning rates. Step it after each optimizer step.

        Args:
            num_training_steps: optimizer steps of the whole run, see `planned_steps`.
            steps_per_epoch: optimizer steps of one pass over the data.
        """
        warmup = self.warmup_steps if self.warmup_steps >= 1 else math.ceil(self.warmup_steps * num_training_steps)
        drops = tuple(round(epoch * steps_per_epoch) for epoch in self.lr_drop_epochs)
        last_step = num_training_steps if self.lr_scheduler == "cosine" else None
        return make_scheduler(optimizer, int(warmup), drops, last_step)

    def optimizers(
        self, model: nn.Module, args: TrainingArguments, num_train_images: int
    ) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Optimizer and schedule for the stock `Trainer(optimizers=...)`, which has no step schedule."""
        optimizer = self.make_optimizer(model, args)
        return optimizer, self.make_scheduler(optimizer, *planned_steps(args, num_train_images))

    # For the model

    def configure(self, model: PreTrainedModel) -> None:
        """Set the `model_settings` in a model's configuration and in the modules built from it.

        `num_denoising=0` removes denoising and its label embedding.

        Raises:
            ValueError: the model has no loss, is wrapped, or was built without denoising. Then it is not changed.
        """
        if not isinstance(model, PreTrainedModel) or not hasattr(model, "criterion"):
            raise ValueError(
                f"model is a {type(model).__name__}, but must be a DinoDetrForObjectDetection. Configure it before it is wrapped "
                "for distributed training, compilation or PEFT."
            )
        config = copy.deepcopy(model.config)
        for name, value in self.model_settings.items():
            setattr(config, name, value)
        config.validate_architecture()
        denoising = model.model.denoising
        if denoising is None and config.num_denoising:
            raise ValueError(
                f"The model was built with num_denoising=0 and the recipe {self.name!r} has {config.num_denoising}: load it with "
                f"from_pretrained(..., num_denoising={config.num_denoising}), or train without denoising by "
                f"get_recipe({self.name!r}, model_settings={{'num_denoising': 0}})."
            )
        for owner in (model, model.model):  # they usually share one configuration
            for name, value in self.model_settings.items():
                setattr(owner.config, name, value)
        model.criterion.configure(config)
        if config.num_denoising:
            denoising.configure(config)
        else:
            model.model.denoising = None


def _check_types(recipe: Recipe) -> None:
    numbers = ("num_train_epochs", "warmup_steps", "weight_decay", "max_grad_norm", "ema_decay", "repeat_threshold")
    rates = ("learning_rate", "backbone_learning_rate", "sampling_offsets_learning_rate")
    counts = ("total_batch_size", "ema_warmup_steps", "early_stopping_patience")
    may_be_none = {field.name for field in dataclasses.fields(recipe) if field.default is None}
    for names, is_valid, kind in (
        ((*numbers, *rates), is_number, "a finite number"),
        (counts, lambda value: is_number(value) and isinstance(value, int), "an int"),
        (("normalize_over_window",), lambda value: isinstance(value, bool), "True or False"),
        (("name",), lambda value: isinstance(value, str), "a string"),
        (
            ("model_settings", "architecture"),
            lambda value: isinstance(value, dict),
            "a dict, such as {'num_denoising': 50}",
        ),
        (("augmentation",), lambda value: isinstance(value, Augmentation), "an Augmentation(...)"),
        (("lr_drop_epochs",), _are_epochs, "a tuple of epochs above 0, each after the one before it, such as (27, 33)"),
    ):
        for name in names:
            value = getattr(recipe, name)
            if not is_valid(value) and not (value is None and name in may_be_none):
                kind += " or None" if name in may_be_none else ""
                kind += f"; write ({value},)" if name == "lr_drop_epochs" and is_number(value) else ""
                raise ValueError(f"{name}={value!r} must be {kind}.")


def _check_ranges(recipe: Recipe) -> None:
    for name, known in (
        ("lr_scheduler", tuple(_SCHEDULERS)),
        ("scale_learning_rate", (None, "linear", "sqrt")),
        ("on_non_finite", ("raise", "skip")),
    ):
        if getattr(recipe, name) not in known:
            raise ValueError(f"{name}={getattr(recipe, name)!r} is unknown; use one of {known}.")
    rates = ("learning_rate", "backbone_learning_rate", "sampling_offsets_learning_rate")
    for name in ("num_train_epochs", *rates, "total_batch_size"):
        if (value := getattr(recipe, name)) is not None and value <= 0:
            raise ValueError(
                f"{name}={value} must be positive. To exclude a part of the model from training, freeze it."
            )
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "ema_warmup_steps"):
        if getattr(recipe, name) < 0:
            raise ValueError(f"{name}={getattr(recipe, name)} must not be negative; 0 turns it off.")
    if (patience := recipe.early_stopping_patience) is not None and patience < 1:
        raise ValueError(f"early_stopping_patience={patience} must be at least 1; None trains to the end.")
    if (decay := recipe.ema_decay) is not None and not 0 < decay < 1:
        raise ValueError(f"ema_decay={decay} must lie between 0 and 1, e.g. 0.9997; None keeps no average.")
    if (threshold := recipe.repeat_threshold) is not None and not 0 < threshold <= 1:
        raise ValueError(
            f"repeat_threshold={threshold} must be a share of the training images in (0, 1], such as 0.05; None repeats no image."
        )
    read_nms(recipe.nms)
    if recipe.class_weights is not None:
        check_class_weights(recipe.class_weights)


def _are_epochs(value: Any) -> bool:
    if not isinstance(value, tuple | list) or not all(is_number(epoch) and epoch > 0 for epoch in value):
        return False
    return all(earlier < later for earlier, later in itertools.pairwise(value))
