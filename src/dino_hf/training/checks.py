"""Checks of the model, arguments and data of `DinoDetrTrainer`, before anything is created."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from ..common.text import count_text, list_some
from ..data.rows import CocoData
from ..data.tiled_data import tiled_images


def check_trainer(args, recipe, train: CocoData | None, held_out: dict[str, Any]) -> None:
    """Check that arguments, recipe and data fit together.

    Args:
        held_out: held-out data sets by name. A single data set has the name "".
    Raises:
        ValueError: they do not fit.
    """
    is_tiled = train is not None and tiled_images(train) is not None
    _check_arguments(args, recipe, bool(held_out), is_tiled)
    _check_names(args, held_out)


def check_sharding(trainer: Trainer, recipe) -> None:
    """
    Raises:
        ValueError: FSDP or DeepSpeed is used, and the recipe needs whole weights or gradients.
    """
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if is_sharded and (recipe.ema_decay is not None or recipe.on_non_finite == "skip"):
        raise ValueError(
            "FSDP and DeepSpeed shard weights and gradients, so weights cannot be averaged and gradients cannot be checked. Use "
            f"get_recipe({recipe.name!r}, ema_decay=None, on_non_finite='raise'), or train without FSDP and DeepSpeed."
        )


def _check_arguments(args, recipe, has_held_out: bool, has_tiles: bool) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"One process has {args.n_gpu} GPUs. Start one process for each: torchrun --nproc-per-node={args.n_gpu} your_script.py."
        )
    if Path(args.output_dir).is_file():
        raise ValueError(f"output_dir={args.output_dir!r} is a file; name a folder.")
    if args.label_smoothing_factor or args.prediction_loss_only:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}, prediction_loss_only={args.prediction_loss_only}: leave both "
            "out. Label smoothing is for softmax losses, and AP needs the predictions."
        )
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True removes the images. Use recipe.training_arguments(...), or set it to False."
        )
    if args.dataloader_drop_last and has_held_out:
        raise ValueError(
            "dataloader_drop_last=True would also leave out held-out images, and COCO AP needs all of them. Leave it False: a "
            "smaller last batch is trained on as well."
        )
    if recipe.repeat_threshold is not None and (order := args.train_sampling_strategy) != "random":
        raise ValueError(
            f"repeat_threshold={recipe.repeat_threshold} repeats images in random order, but train_sampling_strategy={order!r} "
            "asks for another order; leave one of them out."
        )
    if has_tiles and (order := args.train_sampling_strategy) != "random":
        raise ValueError(
            f"train_sampling_strategy={order!r} cannot be used with tiles, which have an order of their own: tiles of an image "
            "follow each other closely, so that it is decoded once for many of them."
        )
    if not has_held_out and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} needs held_out data. Without them, set eval_strategy='no' (and, in a "
            "recipe with early stopping, early_stopping_patience=None)."
        )
    if recipe.early_stopping_patience is not None and (
        args.eval_strategy == "no" or args.metric_for_best_model is None
    ):
        raise ValueError(
            f"early_stopping_patience={recipe.early_stopping_patience} needs evaluations, checkpoints at the same steps and a "
            f"metric_for_best_model, e.g. 'AP', but eval_strategy={args.eval_strategy.value!r}, "
            f"save_strategy={args.save_strategy.value!r} and metric_for_best_model={args.metric_for_best_model!r}. Make the "
            "strategies equal, or change the recipe by early_stopping_patience=None."
        )


def check_classes(model, train: CocoData | None, held_out: dict[str, CocoData]) -> None:
    """Check that the model has the classes of the training data, or else of the held-out data. Prepared rows have no classes.

    Raises:
        ValueError: they do not.
    """
    if train is None:
        for data in held_out.values():
            check_classes(model, data, {})
        return
    if model.config.id2label != train.id2label:
        raise ValueError(
            f"The model has {_listed(model.config.id2label)}, but the training data have {_listed(train.id2label)}. Call "
            "transfer_classes(model, train.id2label, train.category_ids) first."
        )
    if model.config.category_ids not in (None, train.category_ids):
        raise ValueError(
            f"The classes of the model have the category ids {model.config.category_ids[:5]}, but in the training data classes of "
            f"the same names have {train.category_ids[:5]} (the first five of each). Call transfer_classes(model, train.id2label, "
            "train.category_ids) first."
        )


def check_same_classes(train: CocoData | None, held_out: dict[str, CocoData]) -> None:
    """Check that the held-out data have the classes of the training data.

    Raises:
        ValueError: they do not.
    """
    for name, data in held_out.items() if train is not None else ():
        if data.id2label != train.id2label:
            raise ValueError(
                f"The held-out data{f' {name!r}' if name else ''} have {_listed(data.id2label)}, but the training data have "
                f"{_listed(train.id2label)}. Load them with load_coco(..., like=train)."
            )


def _check_names(args, held_out: dict[str, CocoData]) -> None:
    if not held_out or set(held_out) == {""}:
        return
    wrong = [name for name in held_out if not isinstance(name, str) or not name.isidentifier() or name == "ema"]
    if wrong:
        raise ValueError(
            f"A held-out data set is called {wrong[0]!r}. Metrics are called eval_NAME_AP, so a name has only letters, digits and "
            "_, and is not 'ema'."
        )
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if metric and not any(metric.startswith(f"{name}_") for name in held_out):
        raise ValueError(
            f"metric_for_best_model={metric!r} is not a metric of any held-out data set ({', '.join(held_out)}). Name one of "
            f"them, as in {next(iter(held_out))}_AP."
        )


def _listed(id2label: dict[int, str]) -> str:
    return f"{count_text(len(id2label), 'class')} ({list_some(list(id2label.values()), 5)})"
