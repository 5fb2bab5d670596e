"""Optimizer and schedule: AdamW with a lower learning rate for the backbone (DINO app. D.3), and the steps of a run."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

BETAS, EPS = (0.9, 0.999), 1e-8  # defaults of torch, and of the release


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    backbone_learning_rate: float | None = None,
    sampling_offsets_learning_rate: float | None = None,
) -> list[dict]:
    """Trainable parameters in groups for an optimizer, each with its `name` and learning rate `lr`.

    The groups are "transformer", "backbone" and "sampling_offsets". A group without parameters is left out.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`. It may be wrapped by peft, compiled or distributed.
        learning_rate: learning rate of the group "transformer". The projections of the backbone's feature maps belong to it,
            and so does the pyramid of a `DinoDetrVitPyramidBackbone`.
        backbone_learning_rate: learning rate of the backbone. None: a tenth of `learning_rate`, for a pretrained backbone.
        sampling_offsets_learning_rate: learning rate of the linear layers that predict the sampling points of deformable
            attention. Deformable DETR trains them at a tenth of the rate (arXiv:2010.04159, sec. 5). None: they belong to
            "transformer", as in the release of DINO.
    Raises:
        ValueError: the whole model is frozen.
    """
    backbone = 0.1 * learning_rate if backbone_learning_rate is None else backbone_learning_rate
    rates = {"transformer": learning_rate, "backbone": backbone, "sampling_offsets": sampling_offsets_learning_rate}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "backbone.model." in name and "backbone.model.pyramid." not in name:
            groups["backbone"].append(parameter)
        elif ".sampling_offsets." in name and sampling_offsets_learning_rate is not None:
            groups["sampling_offsets"].append(parameter)
        else:
            groups["transformer"].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            f"All parameters of the {type(model).__name__} are frozen, so there is nothing to train. Call unfreeze(model, ...) "
            'with a part, such as "decoder".'
        )
    return [
        {"name": name, "params": parameters, "lr": rates[name]} for name, parameters in groups.items() if parameters
    ]


def make_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    backbone_learning_rate: float | None = None,
    sampling_offsets_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW for the stock trainer: `Trainer(optimizers=(make_optimizer(model, args), None))`.

    Weight decay applies to every parameter, as in the release. `Trainer`'s own schedule scales all learning rates alike. To train
    by a recipe, use `Recipe.make_optimizer` instead.

    Args:
        args: learning rate, weight decay, betas and epsilon.
        backbone_learning_rate, sampling_offsets_learning_rate: see `parameter_groups`.
    """
    groups = parameter_groups(model, args.learning_rate, backbone_learning_rate, sampling_offsets_learning_rate)
    return adamw(groups, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)


def make_own_optimizer(
    model: nn.Module, rates: dict[str, float | None], optimizer_class: type, settings: dict[str, Any]
) -> torch.optim.Optimizer | None:
    """An optimizer of the user's class with the parameter groups of a recipe.

    Args:
        rates: learning rates of the groups, see `Recipe.learning_rates`.
        settings: arguments of the class. `lr` replaces `learning_rate`, and the other rates change by the same factor.
    Returns:
        the optimizer. None if the class needs other inputs than parameter groups; `Trainer` then creates it.
    """
    is_class = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    if not is_class or settings.keys() & {"params", "model", "optimizer_dict"}:
        return None
    factor = settings.get("lr", rates["learning_rate"]) / rates["learning_rate"]
    groups = parameter_groups(model, **{name: rate and rate * factor for name, rate in rates.items()})
    return optimizer_class(groups, **{"lr": rates["learning_rate"] * factor} | settings)


def adamw(
    groups: list[dict], weight_decay: float, betas: tuple[float, float] = BETAS, eps: float = EPS
) -> torch.optim.AdamW:
    """AdamW of torch. Fused: the same update in one pass over memory, which saves a tenth of a small model's step on a CPU."""
    return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)


def images_per_step(args: TrainingArguments) -> int:
    """Number of images in an optimizer step, over all processes and accumulated batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def planned_steps(args: TrainingArguments, num_train_images: int) -> tuple[int, int]:
    """Number of optimizer steps of the whole run and of one epoch, counted as `Trainer` counts them."""
    at_once = args.train_batch_size * args.world_size
    num_batches = num_train_images // at_once if args.dataloader_drop_last else math.ceil(num_train_images / at_once)
    per_epoch = max(1, math.ceil(num_batches / args.gradient_accumulation_steps))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch


def make_scheduler(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, drops: tuple[int, ...], last_step: int | None
) -> LambdaLR:
    """Linear warm-up, then drops to a tenth or a cosine. It scales all learning rates alike.

    Args:
        drops: steps at which the learning rates fall to a tenth.
        last_step: step at which the cosine reaches zero. None: no cosine.
    """
    # A partial saves no state, so a resumed run uses the recipe that is given when it resumes.
    return LambdaLR(optimizer, partial(_factor, num_warmup_steps=num_warmup_steps, drops=drops, last_step=last_step))


def _factor(step: int, num_warmup_steps: int, drops: tuple[int, ...], last_step: int | None) -> float:
    """Factor of the learning rates after `step` steps."""
    warmup = min(1.0, (step + 1) / (num_warmup_steps + 1))
    if last_step is None:
        return warmup * 0.1 ** sum(step >= drop for drop in drops)
    progress = (step - num_warmup_steps) / max(1, last_step - num_warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
