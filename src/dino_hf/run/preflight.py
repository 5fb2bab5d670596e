"""Preflight: the plan of a run, shown before it starts, with the memory and disk space it needs."""

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments

from ..common.text import count_text, list_some, size_text
from ..data.rows import box_columns
from ..model.attention_backends import choose_backend
from ..training.class_balance import epoch_length, images_of_classes, sampling_factors, weights_text
from ..training.coco_data import CocoData
from ..training.departures import find_departures
from ..training.optimizer import images_per_step, parameter_groups, planned_steps
from ..training.recipe import Recipe
from .memory_forecast import SHARE_OF_FREE, MemoryForecast
from .tiles import tiles_line
from .trained_parts import count_parameters, saved_bytes

_MOST_CLASSES = 12  # classes listed
_MOST_REPEATED = 6  # repeated classes that the plan lists
_MOST_OPENED = 200  # images opened if the annotations have no sizes
_SHARE_OF_TOKENS = 0.1  # share of the tokens of an image that should be selected as queries
_PUBLISHED_QUERIES = 900  # of the published detectors; this number is not warned of
_RARE = 10  # a class with fewer training boxes gets a warning


@dataclass(frozen=True, repr=False)
class Preflight:
    """The plan of a run, as plain JSON.

    Args:
        data: origin, notes, images of each split, tiles, classes with their boxes, boxes and sizes of the training images.
        model: source, kept and new classes, frozen parts or adapters, parameters, trained parameters.
        plan: device, precision, images per step, repeated images, class weights, learning rates, departures from the
            recipe, epochs, steps, evaluations.
        memory: forecast for a step and free memory, in bytes; None without a forecast.
        disk: needed and free space, in bytes.
        warnings: sentences.
    """

    data: dict[str, Any]
    model: dict[str, Any]
    plan: dict[str, Any]
    memory: dict[str, Any] | None
    disk: dict[str, Any]
    warnings: list[str]

    def __repr__(self) -> str:
        images = ", ".join(f"{name} {count}" for name, count in self.data["images"].items() if count is not None)
        return f"Preflight(images {images}; {len(self.data['classes'])} classes, {len(self.warnings)} warnings)"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def show(self, console: Console) -> None:
        """Print the plan as a table, and the warnings below it."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="bold")
        grid.add_column()
        for title, text in self._rows():
            grid.add_row(title, Text(text))
        console.print(grid)
        for warning in self.warnings:
            console.print(Text(f"warning: {warning}", style="bold red"), soft_wrap=True)

    def _rows(self) -> Iterator[tuple[str, str]]:
        data, plan = self.data, self.plan
        images = ", ".join(f"{count:,} {_SPLITS[name]}" for name, count in data["images"].items() if count is not None)
        yield "Data", f"{data['origin']}: images {images}"
        for note in data["notes"]:
            yield "", note
        counts = sorted(data["classes"].items(), key=lambda item: -item[1])
        listed = list_some([f"{name} {count:,}" for name, count in counts], _MOST_CLASSES)
        yield count_text(len(counts), "class"), f"{listed} (boxes in training)"
        boxes = data["boxes"]
        yield (
            "Boxes",
            f"{boxes['all']:,} in training, at most {boxes['most_in_an_image']:,} in an image; images without boxes: "
            f"{boxes['images_without']:,}; crowd regions: {boxes['crowds']:,}",
        )
        sizes = data["image_sizes"]
        yield (
            "Image sizes",
            f"width {sizes['width'][0]} to {sizes['width'][2]}, median {sizes['width'][1]}; height {sizes['height'][0]} to "
            f"{sizes['height'][2]}, median {sizes['height'][1]}",
        )
        if data.get("tiles"):
            yield "Tiles", tiles_line(data["tiles"], data["images"]["train"])
        size, trained = self.model["parameters"], self.model["trained_parameters"]
        limited = "" if trained == size else f", {count_parameters(trained)} trained"
        yield "Model", f"{self.model['from']}; {count_parameters(size)} parameters{limited}"
        for line in self.model["notes"]:
            yield "", line
        yield "Runs on", f"{plan['device']}, {plan['precision']}; deformable attention: {plan['attention_backend']}"
        per = plan["images_per_step"]
        processes = f"{per['processes']} process{'es' if per['processes'] > 1 else ''}"
        yield (
            "Step",
            f"{per['all']} images = {per['of_a_batch']} in a batch x {processes} x {per['accumulated']} accumulated; the recipe "
            f"has {per['of_the_recipe']}",
        )
        if plan.get("repeats"):
            yield "Repeats", _repeats_line(plan["repeats"])
        if plan.get("class_weights"):
            yield "Class weights", plan["class_weights"]
        yield "Learning rates", ", ".join(f"{name} {rate:g}" for name, rate in plan["learning_rates"].items())
        for line in plan["departures"]:
            yield "", f"departs from {plan['recipe']}: {line}"
        yield (
            "Plan",
            f"{plan['recipe']}: {plan['epochs']:g} {'epoch' if plan['epochs'] == 1 else 'epochs'} of "
            f"{count_text(plan['steps_per_epoch'], 'step')}, {count_text(plan['steps'], 'step')}, "
            f"{count_text(plan['evaluations'], 'evaluation')}"
            + (f"; {plan['stops']}" if plan["stops"] else "")
            + (f"; resumed after step {plan['steps_done']:,}" if plan["steps_done"] else ""),
        )
        if self.memory is not None:
            yield "Memory", _memory_line(self.memory)
        yield (
            "Disk",
            f"{size_text(self.disk['needed'])} for {self.disk['what']}; {size_text(self.disk['free'])} free",
        )


_SPLITS = {"train": "to train on", "validation": "held out", "test": "for the test at the end"}


def _repeats_line(repeats: dict[str, Any]) -> str:
    start = f"{repeats['images_per_epoch']:,} images in an epoch instead of {repeats['images']:,}"
    repeated = [(name, *pair) for name, pair in repeats["images_of_classes"].items() if pair[1] - pair[0] >= 0.5]
    if not repeated:
        return f"{start}: no class is repeated at the threshold {repeats['threshold']:g}"
    repeated.sort(key=lambda row: -row[2] / row[1])
    texts = [f"{name} {before:,} to {after:,.0f}" for name, before, after in repeated]
    return f"{start}; images with {list_some(texts, _MOST_REPEATED)}"


def _memory_line(memory: dict[str, Any]) -> str:
    height, width = memory["image_size"]
    tensors = "gradients, optimizer and average" if memory["process"] else "weights, gradients, optimizer and average"
    has = f"{size_text(memory['process'])} that the process uses now, " if memory["process"] else ""
    return (
        f"about {size_text(memory['total'])} for each process: {has}{size_text(memory['fixed'])} for {tensors}, "
        f" {size_text(memory['per_image'])} for each image of up to {width} x {height} with {memory['boxes']} boxes; "
        f"{size_text(memory['free'])} free"
    )


# Parts of the preflight


def describe_data(origin: str, notes: list[str], splits: dict[str, CocoData | None]) -> dict[str, Any]:
    """`Preflight.data` of data sets by split: train, validation, test."""
    train = splits["train"]
    categories, is_crowd, image = box_columns(train)
    per_image = np.bincount(image[~is_crowd], minlength=len(train.dataset))
    counts = np.bincount(categories[~is_crowd], minlength=len(train.id2label))
    sizes = np.array(image_sizes(train))  # (I, 2)
    return {
        "origin": str(origin),
        "notes": list(notes),
        "images": {name: None if part is None else len(part.dataset) for name, part in splits.items()},
        "classes": {name: int(counts[index]) for index, name in train.id2label.items()},
        "boxes": {
            "all": int((~is_crowd).sum()),
            "most_in_an_image": int(per_image.max(initial=0)),
            "images_without": int((per_image == 0).sum()),
            "crowds": int(is_crowd.sum()),
        },
        "image_sizes": {
            name: [int(value) for value in (values.min(), np.median(values), values.max())]
            for name, values in (("height", sizes[:, 0]), ("width", sizes[:, 1]))
        },
    }


def image_sizes(data: CocoData) -> list[tuple[int, int]]:
    """(height, width) of all images. If annotations lack sizes, of up to 200 images, which are opened."""
    columns = data.dataset.select_columns(["height", "width"])[:]
    sizes = list(zip(columns["height"], columns["width"], strict=True))
    if all(None not in size for size in sizes):
        return sizes
    opened = np.linspace(0, len(sizes) - 1, min(len(sizes), _MOST_OPENED)).astype(int)
    images = (data.dataset[int(index)]["image"] for index in np.unique(opened))
    return [(image.height, image.width) for image in images]


def describe_balance(train: CocoData, recipe: Recipe) -> dict[str, Any]:
    """Parts of `Preflight.plan` about rare classes: images of an epoch, of all classes and of each class, and class weights."""
    parts: dict[str, Any] = {"repeats": None, "class_weights": None}
    if recipe.repeat_threshold is not None:
        factors = sampling_factors(train, recipe.repeat_threshold)
        before, after = images_of_classes(train, np.ones_like(factors)), images_of_classes(train, factors)
        classes = zip(train.id2label.values(), before.tolist(), after.tolist(), strict=True)
        parts["repeats"] = {
            "threshold": recipe.repeat_threshold,
            "images": len(factors),
            "images_per_epoch": epoch_length(factors),
            "images_of_classes": {name: [int(once), round(often, 1)] for name, once, often in classes},
        }
    if recipe.class_weights is not None:
        parts["class_weights"] = weights_text(train, recipe.class_weights)
    return parts


def describe_plan(
    recipe: Recipe, args: TrainingArguments, model: nn.Module, num_images: int, steps_done: int
) -> dict[str, Any]:
    """`Preflight.plan` of a run whose epochs have `num_images` images."""
    steps, per_epoch = planned_steps(args, num_images)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    patience = recipe.early_stopping_patience
    is_stopping = patience is not None and args.eval_strategy != "no"
    return {
        "recipe": recipe.name,
        "device": name,
        "precision": str(dtype).removeprefix("torch.") + ("" if dtype == torch.float32 else " autocast"),
        "attention_backend": choose_backend(model.config.ms_deform_attn_backend, args.device.type, dtype),
        "images_per_step": {
            "all": images_per_step(args),
            "of_a_batch": args.train_batch_size,
            "processes": args.world_size,
            "accumulated": args.gradient_accumulation_steps,
            "of_the_recipe": recipe.total_batch_size,
        },
        "learning_rates": {
            group["name"]: group["lr"] for group in parameter_groups(model, **recipe.learning_rates(args))
        },
        "departures": find_departures(recipe, args, model.config, num_images),
        "epochs": round(steps / per_epoch, 2),
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "steps_done": steps_done,
        "evaluations": _num_evaluations(args, steps, per_epoch),
        "stops": f"stops after {patience} evaluations without a better AP" if is_stopping else None,
        "seed": args.seed,
    }


def _num_evaluations(args: TrainingArguments, steps: int, per_epoch: int) -> int:
    if args.eval_strategy == "no":
        return 0
    if args.eval_strategy == "steps":
        return steps // int(args.eval_steps if args.eval_steps >= 1 else max(1, args.eval_steps * steps))
    return -(-steps // per_epoch)


def describe_memory(forecast: MemoryForecast, free: int, args: TrainingArguments) -> dict[str, Any]:
    """`Preflight.memory`: peak bytes of one process in a step.

    On a CPU, the memory that the process uses now is included, because Python, the libraries and the weights are in the same
    memory. A GPU has only the tensors.
    """
    tensors = forecast.total(args.train_batch_size)
    process = psutil.Process().memory_info().rss if args.device.type == "cpu" else 0
    held = forecast.weights if process else 0  # the process has the weights already
    return {
        "total": process + tensors - held,
        "more": tensors - held,  # beyond the memory that is used now
        "weights": forecast.weights,
        "fixed": forecast.fixed - held,
        "per_image": forecast.per_image,
        "image_size": list(forecast.size),
        "boxes": forecast.num_boxes,
        "free": free,
        "process": process,
        "planned_share_of_free": SHARE_OF_FREE,
    }


def describe_disk(model: nn.Module, recipe: Recipe, args: TrainingArguments, output_dir: Path) -> dict[str, Any]:
    """`Preflight.disk`: space for checkpoints, with one that is being written, and for the best and the last weights."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    saved = saved_bytes(model)
    checkpoint = saved + 2 * trained + (saved if recipe.ema_decay is not None else 0)
    limit = args.save_total_limit
    kept = 0 if args.save_strategy == "no" else (limit or 0) + 1
    existing = next(folder for folder in (output_dir.resolve(), *output_dir.resolve().parents) if folder.exists())
    many = " (checkpoints are never deleted; each needs this space)" if kept and not limit else ""
    return {
        "needed": kept * checkpoint + 2 * weights,
        "checkpoint": checkpoint,
        "free": shutil.disk_usage(existing).free,
        "what": f"up to {kept} checkpoints, the best and the last weights{many}" if kept else "the weights",
    }


def few_queries(config: PreTrainedConfig, size: tuple[int, int]) -> list[str]:
    """A warning if images have fewer tokens than queries, or many more: only selected tokens train the encoder's heads.

    900 queries or more are not too few: published detectors learned with them on images of about 20,000 tokens.

    Args:
        size: (height, width) of the largest training images in pixels. Their tokens are estimated from the usual strides.
    """
    backbone = config.backbone_config
    stages = getattr(backbone, "out_features", None) or ["stage2"]
    stage = re.search(r"\d+", str(stages[0]))
    usual = 2 ** (int(stage[0]) + 1) if stage else 8
    first = getattr(backbone, "map_strides", {}).get(stages[0], usual)
    strides = [first * 2**level for level in range(config.num_feature_levels)]
    tokens = sum(-(-size[0] // stride) * -(-size[1] // stride) for stride in strides)
    if config.num_queries > tokens:
        return [
            f"num_queries={config.num_queries} is more than the about {tokens:,} tokens of the largest training images. The model "
            "gives at most one detection for each token. Use fewer queries, or larger images."
        ]
    if config.num_queries >= min(_PUBLISHED_QUERIES, _SHARE_OF_TOKENS * tokens):
        return []
    return [
        f"num_queries={config.num_queries} is less than a tenth of the about {tokens:,} tokens of an image. Only selected tokens "
        "train the encoder's heads, so a detector with few queries learns slowly. Use more queries, or smaller images."
    ]


def find_warnings(
    data: dict[str, Any], memory: dict[str, Any] | None, findings: list[str], kept: Sequence[str] = ()
) -> list[str]:
    """All warnings of a preflight: the given findings, classes with few boxes, and too little memory.

    Args:
        kept: old classes, whose boxes are detections of the old detector.
    """
    warnings = list(findings)
    empty = [name for name, count in data["classes"].items() if count == 0 and name not in kept]
    if empty:
        warnings.append(f"no training box has the class {list_some(empty, _MOST_CLASSES)}: the model cannot learn it.")
    if rare := [name for name, count in data["classes"].items() if 0 < count < _RARE and name not in kept]:
        warnings.append(f"fewer than {_RARE} training boxes each have the class {list_some(rare, _MOST_CLASSES)}.")
    if few := [name for name in kept if data["classes"][name] < _RARE]:
        warnings.append(
            f"the old detector finds fewer than {_RARE} objects each of {list_some(few, _MOST_CLASSES)} in the training images, "
            "so training may forget these classes."
        )
    if memory is not None and memory["more"] > memory["free"]:
        warnings.append(
            f"a step needs about {size_text(memory['more'])} more, but only {size_text(memory['free'])} are free. Use a smaller "
            "--batch-size, --activation-checkpointing, --bf16, smaller images (--short-sides, --longest-side), or fewer "
            "--max-denoising-queries."
        )
    return warnings
