"""Checks of the model, arguments and data of `DinoDetrTrainer`, before anything is created."""

from pathlib import Path

from ..common.text import count_text, list_some
from ..data.rows import CocoData


def check_trainer(model, args, recipe, train: CocoData, held_out: dict[str, CocoData]) -> None:
    """
    Args:
        held_out: held-out data sets by name. A single one has the name "".
    Raises:
        ValueError: model, arguments, recipe and data do not fit together.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"One process has {args.n_gpu} GPUs; start one process for each: torchrun --nproc-per-node={args.n_gpu} your_script.py."
        )
    if Path(args.output_dir).is_file():
        raise ValueError(f"output_dir={args.output_dir!r} is a file; name a folder.")
    if args.label_smoothing_factor or args.prediction_loss_only:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}, prediction_loss_only={args.prediction_loss_only}: leave both "
            "out. The first is of softmax losses, and AP needs more than the loss."
        )
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True takes away the images; use recipe.training_arguments(...), or set it to False."
        )
    if args.dataloader_drop_last and held_out:
        raise ValueError(
            "dataloader_drop_last=True would also leave out held-out images, of which COCO AP needs all; leave it False: a last "
            "batch of fewer images trains as well."
        )
    classes = model.config.id2label
    if classes != train.id2label:
        raise ValueError(
            f"The model has {_some(classes)}, the training data {_some(train.id2label)}: call transfer_classes(model, "
            "train.id2label, train.category_ids) first."
        )
    if model.config.category_ids not in (None, train.category_ids):
        raise ValueError(
            f"The model's classes have the category ids {model.config.category_ids[:5]}, those of the same names in the training "
            f"data {train.category_ids[:5]} (the first of each): call transfer_classes(model, train.id2label, train.category_ids) "
            "first."
        )
    for name, data in held_out.items():
        if data.id2label != train.id2label:
            raise ValueError(
                f"The held-out data{f' {name!r}' if name else ''} have {_some(data.id2label)}, the training data "
                f"{_some(train.id2label)}: load them with load_coco(..., like=train)."
            )
    if not held_out and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} needs held_out data; without them, set eval_strategy='no' (and, in a "
            "recipe with early stopping, early_stopping_patience=None)."
        )
    _check_names(args, held_out)
    if recipe.early_stopping_patience is not None and (
        args.eval_strategy == "no" or args.metric_for_best_model is None
    ):
        raise ValueError(
            f"early_stopping_patience={recipe.early_stopping_patience} needs evaluations, checkpoints at the same steps and a "
            f"metric_for_best_model, e.g. 'AP', but eval_strategy={args.eval_strategy.value!r}, "
            f"save_strategy={args.save_strategy.value!r} and metric_for_best_model={args.metric_for_best_model!r}: make the "
            "strategies equal, or change the recipe by early_stopping_patience=None."
        )


def _check_names(args, held_out: dict[str, CocoData]) -> None:
    if not held_out or set(held_out) == {""}:
        return
    wrong = [name for name in held_out if not isinstance(name, str) or not name.isidentifier() or name == "ema"]
    if wrong:
        raise ValueError(
            f"A held-out data set is called {wrong[0]!r}; names are letters, digits and _, and not 'ema', as metrics are called "
            "eval_NAME_AP."
        )
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if metric and not any(metric.startswith(f"{name}_") for name in held_out):
        raise ValueError(
            f"metric_for_best_model={metric!r} is a metric of none of the held-out data sets {', '.join(held_out)}: name one of "
            f"them, as in {next(iter(held_out))}_AP."
        )


def _some(id2label: dict[int, str]) -> str:
    return f"{count_text(len(id2label), 'class')} ({list_some(list(id2label.values()), 5)})"
