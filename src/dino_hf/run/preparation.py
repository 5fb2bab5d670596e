"""The batch size and the preflight of a run."""

import dataclasses
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..common.text import size_text
from ..data.tiled_data import whole_images
from ..training.checkpoint_files import newest_checkpoint
from ..training.class_balance import images_per_epoch
from ..training.optimizer import planned_steps
from .memory_forecast import choose_batch_size, forecast_memory, free_memory
from .plan import Plan, processes_here
from .preflight import (
    Preflight,
    describe_balance,
    describe_data,
    describe_disk,
    describe_memory,
    describe_plan,
    few_queries,
    find_warnings,
    image_sizes,
)
from .recipe_choice import unsuitable_recipe
from .record import RunRecord
from .starting_model import Start
from .tiles import describe_tiles
from .trained_parts import num_trained


def prepare(
    plan: Plan, record: RunRecord, start: Start, batch_size: int | str, findings: list[str]
) -> tuple[TrainingArguments, Preflight]:
    """Choose the batch size and describe the run in a preflight."""
    splits, recipe, model = plan.splits, plan.recipe, start.model
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    whole = {name: None if part is None else whole_images(part) for name, part in parts.items()}
    data = describe_data(splits.origin, splits.notes, whole)
    data["tiles"] = describe_tiles(splits.train, splits.validation, recipe.repeat_threshold)
    kept = [] if plan.groups is None else plan.groups.old
    probe = plan.training_arguments()
    canvas_side = getattr(start.image_processor, "canvas_side", None)
    most_boxes = describe_data("", [], parts)["boxes"]["most_in_an_image"]
    forecast = forecast_memory(model, recipe, probe, set(image_sizes(splits.train)), most_boxes, canvas_side)
    free = _minimum(free_memory(probe.device) // _processes_per_device(probe), probe)
    if batch_size != "auto":
        record.values["batch_size"] = int(batch_size)
    elif "batch_size" not in record.recorded:
        record.values["batch_size"] = choose_batch_size(forecast, free, recipe, probe.device, probe.world_size)
    per_process = record.values["batch_size"]
    accumulation = max(1, round(recipe.total_batch_size / (per_process * probe.world_size)))
    args = plan.training_arguments(per_process, accumulation)
    memory = describe_memory(forecast, free, args)
    num_images = images_per_epoch(splits.train, recipe.repeat_threshold)
    rates = recipe.learning_rates(args)
    findings = findings + unsuitable_recipe(
        start, dataclasses.replace(recipe, **rates), planned_steps(args, num_images)[0]
    )
    preflight = Preflight(
        data=data,
        model={
            "from": start.source,
            "notes": start.notes,
            "parameters": model.num_parameters(),
            "trained_parameters": num_trained(model),
            "image_processor": type(start.image_processor).__name__,
        },
        plan=describe_plan(recipe, args, model, num_images, _steps_done(plan.output_dir))
        | describe_balance(splits.train, recipe),
        memory=memory,
        disk=describe_disk(model, recipe, args, plan.output_dir),
        warnings=find_warnings(
            data, memory, findings + few_queries(model.config, forecast.size) + record.changes(), kept
        ),
    )
    if (disk := preflight.disk)["needed"] > disk["free"]:
        raise ValueError(
            f"The run needs {size_text(disk['needed'])} for {disk['what']}, but only {size_text(disk['free'])} are free on the "
            f"disk of {plan.output_dir}. Make room, or choose another --output-dir."
        )
    return args, preflight


def _steps_done(output_dir: Path) -> int:
    checkpoint = newest_checkpoint(output_dir)
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def _processes_per_device(args: TrainingArguments) -> int:
    """Number of processes of this run that share the memory of a device."""
    return 1 if args.device.type == "cuda" else processes_here(args)


def _minimum(value: int, args: TrainingArguments) -> int:
    """The smallest value of all processes."""
    if args.world_size == 1:
        return value
    values = [0] * args.world_size
    torch.distributed.all_gather_object(values, value)
    return min(values)
