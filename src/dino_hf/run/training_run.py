"""`train`: the whole training run behind `dino-hf train`."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..common.output_folders import write_beside
from ..data import DetectionData, RawDataset, read_raw
from ..data.load import load_raw
from ..evaluation import Evaluation
from ..training.checkpoint_files import check_checkpoint, newest_checkpoint
from ..training.coco_data import CocoData
from ..training.readable_images import TooManyBadImages
from ..training.recipe import Recipe
from ..training.run_lock import locked_run
from ..training.trainer import DinoDetrTrainer
from .data_findings import data_findings
from .image_check import leave_out_bad_images
from .machine_failures import MACHINE_ERRORS, failure_of_the_machine, memory_sentence
from .memory_forecast import choose_batch_size, forecast_memory, free_memory
from .plan import Plan, fitted, processes_here
from .preflight import (
    Preflight,
    box_columns,
    describe_data,
    describe_disk,
    describe_memory,
    describe_plan,
    few_queries,
    find_warnings,
    image_sizes,
    size_text,
)
from .progress import BestOfBoth, TrainingProgress
from .record import RunRecord, place
from .results import keep_weights, leave_results
from .settings import find_trackers, flat_settings, split_settings
from .starting_model import Start, load_checkpoint, load_start
from .streams import read_streams

PREFLIGHT_NAME = "preflight.json"


class TrainingRun(NamedTuple):
    output_dir: Path
    preflight: Preflight
    evaluation: Evaluation | None  # of the weights in `output_dir`, on the held-out images; only in the first process
    test: Evaluation | None  # the same on test images, if there are any
    trainer: DinoDetrTrainer | None  # None if nothing was trained: a dry run, or a run that was already finished

    def __repr__(self) -> str:
        return f"TrainingRun({str(self.output_dir)!r:.100}: validation {self.evaluation!r}, test {self.test!r})"


@contextmanager
def _without_bars_of_the_library() -> Iterator[None]:
    """Hide the progress bars that transformers shows while it reads and writes files."""
    were_shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            enable_progress_bar()


@_without_bars_of_the_library()
def train(
    data: Any,
    *,
    model: str | Path | None = None,
    recipe: str | None = None,
    output_dir: str | Path = "outputs/train",
    resume: bool = False,
    batch_size: int | str = "auto",
    report_to: str | Sequence[str] | None = None,
    seed: int | None = None,
    validation_fraction: float | None = None,
    box_format: str | None = None,
    allow_outside: bool | None = None,
    trust_boxes: bool | None = None,
    on_bad_image: str | None = None,
    check_images: bool = False,
    training_doctor: bool | None = None,
    dry_run: bool = False,
    **settings,
) -> TrainingRun:
    """Fine-tune a detector and evaluate it; `dino-hf train` in Python.

        run = dino_hf.train("my-data", model="dino-r50-4scale", output_dir="outputs/birds")
        print(run.evaluation.metrics["AP"], run.evaluation.intervals["AP"])

    The plan is printed before training starts: data, classes that are kept, departures from the recipe, memory, disk.

    Afterwards, the folder holds the best weights: the raw or averaged weights with the highest AP on held-out images. They load
    with `from_pretrained` and `pipeline`. `last/` holds the weights of the last step. Beside them are `results.json`, plots,
    `curves.png`, `history.csv`, a model card, the same for test images in `test/`, and checkpoints.

    A run that is interrupted at any moment and resumed ends with the same weights as an uninterrupted run. Several processes
    (`torchrun`) share the work.

    Args:
        data: anything that `dino_hf.data.load_data` reads, its result, or a pair of `CocoData`: training and held-out data.
        model: folder or id on the Hub of a DINO detector. Classes that it knows by name keep their weights. A folder with a
            configuration and no weights starts from random weights. None: R50 with 4 scales and a published backbone.
        recipe: a name of `RECIPES`; None: "finetune".
        output_dir: a new or empty folder, or the folder of the run to resume.
        resume: continue from the newest whole checkpoint. Settings that are not given are those of the earlier run. Without a
            checkpoint, start from the beginning. For a finished run, only the results are written again.
        batch_size: images of a batch in each process, or "auto": as many as fit. Batches are accumulated until a step has the
            number of images of the recipe.
        report_to: trackers, "tensorboard", "wandb", "trackio", or "none"; None: TensorBoard, if it is installed.
        seed: random seed, also for a split of the data. None: 0.
        validation_fraction: share of the training images to hold out if there are no validation images. None: 0.2.
        box_format: layout of the boxes, for data that do not state it, see `load_data`.
        allow_outside: also read files outside of the data set's folder. None: False.
        trust_boxes: do not check the layout of the boxes. None: False.
        on_bad_image: "skip": leave out, with a warning, images that cannot be read or have another size than annotated. If such an
            image is found only in training, another one takes its place, and `run.json` lists it in `bad_images`; more than a
            tenth of the images are an error. "raise": stop. None: "skip".
        check_images: decode all images before the first step, which finds truncated files. By default, validation and test
            images and up to 2,000 training images are decoded. With more training images, only the start of each file is read.
        training_doctor: log the findings of `TrainingDoctor`. None: True.
        dry_run: stop before training; nothing is written.
        settings: fields of `Recipe`, of its `Augmentation` and `model_settings`, and of `TrainingArguments`, by name. By default,
            training images have the sizes of the model's image processor.
    Raises:
        ValueError, FileNotFoundError, OSError, ImportError: one sentence says what is wrong and what to do.
    """
    from ..evaluation import report  # noqa: F401  here: it needs matplotlib, and says so before an hour of training

    if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'batch_size={batch_size!r} must be a number of images, or "auto".')
    RunRecord.take_up(Path(output_dir), resume)  # checks the folder before a lock is written to it
    with nullcontext() if dry_run else locked_run(Path(output_dir), os.environ.get("RANK", "0") == "0"):
        record = RunRecord.take_up(Path(output_dir), resume)
        record.settle_model(model)
        if record.settle("on_bad_image", on_bad_image, "skip") not in ("skip", "raise"):
            raise ValueError(f'on_bad_image={on_bad_image!r} must be "skip" or "raise".')
        choices = {"validation_fraction": validation_fraction, "box_format": box_format}
        record.settle("allow_outside", allow_outside, False)
        record.settle("trust_boxes", trust_boxes, False)
        record.settle("source", place(data) if isinstance(data, str | Path) else None, None)
        record.settle("training_doctor", training_doctor, True)
        choices["check_images"] = check_images
        return _train(data, record, recipe, resume, batch_size, report_to, seed, choices, dry_run, settings)


def _train(
    data: Any,
    record: RunRecord,
    recipe: str | None,
    resume: bool,
    batch_size: int | str,
    report_to: str | Sequence[str] | None,
    seed: int | None,
    choices: dict[str, Any],
    dry_run: bool,
    settings: dict[str, Any],
) -> TrainingRun:
    console, output_dir = Console(), record.output_dir
    seed = record.settle("seed", seed, 0)
    trackers = record.settle("report_to", None if report_to is None else find_trackers(report_to), find_trackers(None))
    given = record.settle_settings(flat_settings(settings))
    recipe, others = split_settings(record.settle("recipe", recipe, "finetune"), given)

    check_images = choices.pop("check_images")
    data = read_streams(data, str(output_dir), others.get("use_cpu", not torch.accelerator.is_available()))
    splits, raw = _detection_data(data, record, seed, **choices)
    findings = data_findings(data, splits, record.values, raw)
    del raw  # of a large data set, it takes gigabytes
    splits, bad_images = leave_out_bad_images(splits, record.values["on_bad_image"], check_images)
    findings += bad_images
    if resume and not record.is_resumed:
        findings.insert(0, f"there is no run in {output_dir} to resume: this one starts from the beginning.")
    try:
        start = _load(record, splits.train, seed)
    except OSError as error:
        if resume and not record.is_resumed:
            raise OSError(f"There is no run in {output_dir} to resume, and a new one cannot start. {error}") from error
        raise
    findings += _about_random_weights(start, recipe)
    recipe = fitted(recipe, given, start.image_processor, splits.validation is not None)
    recipe.configure(start.model)
    arguments = others | {"seed": seed, "report_to": trackers or "none"}
    plan = Plan(recipe, arguments, record.output_dir, splits)
    args, preflight = _prepare(plan, record, start, batch_size, findings)
    if record.is_finished and (changes := record.changes()):
        raise ValueError(
            f"The run in {output_dir} is finished, and would not change: {changes[0]} To train further, start another one with "
            f"--model {output_dir}."
        )
    is_first = args.process_index == 0
    if is_first:
        preflight.show(console)
    if dry_run:
        return TrainingRun(record.output_dir, preflight, None, None, None)
    trainer = None
    if not record.is_finished:
        if args.world_size > 1:
            torch.distributed.barrier()  # all processes have read the folder
        if is_first:
            record.write()
            with write_beside(output_dir / PREFLIGHT_NAME) as path:
                path.write_text(json.dumps(preflight.as_dict(), indent=2) + "\n", encoding="utf-8")
        trainer = _run_trainer(plan, start, args, record, console)
    if not is_first:
        return TrainingRun(record.output_dir, preflight, None, None, trainer)
    try:
        if trainer is not None:
            keep_weights(trainer, record)
        evaluation, test = leave_results(record, splits, args, console)
    except KeyboardInterrupt as error:
        error.add_note("All steps are done; --resume goes on with the evaluation.")
        raise
    record.values["finished"] = True
    record.write()
    return TrainingRun(record.output_dir, preflight, evaluation, test, trainer)


def _detection_data(
    data: Any, record: RunRecord, seed: int, validation_fraction, box_format
) -> tuple[DetectionData, RawDataset | None]:
    """Read the data to train on and to evaluate on.

    Returns:
        the data, and what their files say; None if the data were read before.
    Raises:
        ValueError: there is no training image with a box, or no held-out image with a box by which to choose the best weights.
    """
    fraction = record.settle("validation_fraction", validation_fraction, 0.2)
    box_format = record.settle("box_format", box_format, None)
    raw = None
    if isinstance(data, DetectionData):
        splits = data
    elif isinstance(data, CocoData):
        splits = DetectionData(data, None, None, [], data.name or "")
    elif isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(one, CocoData) for one in data):
        splits = DetectionData(*data, None, [], data[0].name or "")
    else:
        raw = read_raw(data, box_format=box_format, allow_outside=record.values["allow_outside"])
        trust_boxes = record.values["trust_boxes"]
        splits = load_raw(raw, data, validation_fraction=fraction, seed=seed, trust_boxes=trust_boxes)
    if splits.train is None:
        raise ValueError(f"{splits.origin} has no images to train on; name the data set that has a train split.")
    for part, what in ((splits.train, "to train on"), (splits.validation, "held out")):
        if part is not None and box_columns(part)[1].all():  # all of them crowds, or none at all
            raise ValueError(
                f"None of the {len(part.dataset)} images {what} in {splits.origin} has a box, so there is nothing to learn or to "
                "measure; give data that have some in each part (or none held out: no validation images, --validation-fraction 0)."
            )
    record.check_data(splits.train, splits.validation)
    return splits, raw


def _load(record: RunRecord, train: CocoData, seed: int) -> Start:
    """The model that a run starts from; of a resumed run the newest checkpoint, of a finished run its result."""
    checkpoint = str(record.output_dir) if record.is_finished else newest_checkpoint(record.output_dir)
    if record.is_resumed and checkpoint is not None:
        if not record.is_finished:
            check_checkpoint(Path(checkpoint))
        start = load_checkpoint(checkpoint, record.recorded["start"], record.recorded["start_notes"])
    else:
        start = load_start(record.values["model"], train, seed)
        record.values |= {"start": start.source, "start_notes": start.notes}
    return start


def _about_random_weights(start: Start, recipe: Recipe) -> list[str]:
    if recipe.name != "finetune" or not start.source.startswith("random weights"):
        return []
    return [
        f"the detector starts from random weights, and the recipe finetune is for trained ones: its learning rate, "
        f"{recipe.learning_rate:g}, and number of epochs are too small. Start from a trained detector (--model), or choose "
        "--recipe scratch for a small model or paper-36ep for a large one."
    ]


def _prepare(
    plan: Plan, record: RunRecord, start: Start, batch_size: int | str, findings: list[str]
) -> tuple[TrainingArguments, Preflight]:
    """Choose the batch size and describe the run in a preflight."""
    splits, recipe, model = plan.splits, plan.recipe, start.model
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    data = describe_data(splits.origin, splits.notes, parts)
    probe = plan.training_arguments()
    forecast = forecast_memory(model, recipe, probe, set(image_sizes(splits.train)), data["boxes"]["most_in_an_image"])
    free = _least(free_memory(probe.device) // _sharing(probe), probe)
    if batch_size != "auto":
        record.values["batch_size"] = int(batch_size)
    elif "batch_size" not in record.recorded:
        record.values["batch_size"] = choose_batch_size(forecast, free, recipe, probe.device, probe.world_size)
    of_a_batch = record.values["batch_size"]
    accumulation = max(1, round(recipe.total_batch_size / (of_a_batch * probe.world_size)))
    args = plan.training_arguments(of_a_batch, accumulation)
    memory = describe_memory(forecast, free, args)
    num_images = len(splits.train.dataset)
    preflight = Preflight(
        data=data,
        model={
            "from": start.source,
            "notes": start.notes,
            "parameters": model.num_parameters(),
            "image_processor": type(start.image_processor).__name__,
        },
        plan=describe_plan(recipe, args, model, num_images, _steps_done(plan.output_dir)),
        memory=memory,
        disk=describe_disk(model, recipe, args, plan.output_dir),
        warnings=find_warnings(data, memory, findings + few_queries(model.config, forecast.size) + record.changes()),
    )
    if (disk := preflight.disk)["needed"] > disk["free"]:
        raise ValueError(
            f"The run needs {size_text(disk['needed'])} for {disk['what']}, and {size_text(disk['free'])} are free where "
            f"{plan.output_dir} lies: make room, or choose another --output-dir."
        )
    return args, preflight


def _steps_done(output_dir: Path) -> int:
    checkpoint = newest_checkpoint(output_dir)
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def _sharing(args: TrainingArguments) -> int:
    """Number of processes of this run that share the memory of a device."""
    return 1 if args.device.type == "cuda" else processes_here(args)


def _least(value: int, args: TrainingArguments) -> int:
    """The least value of all processes."""
    if args.world_size == 1:
        return value
    values = [0] * args.world_size
    torch.distributed.all_gather_object(values, value)
    return min(values)


def _run_trainer(plan: Plan, start: Start, args: TrainingArguments, record: RunRecord, console: Console):
    progress = TrainingProgress(console)
    with _quiet_about(plan.recipe):
        trainer = DinoDetrTrainer(
            start.model,
            args,
            recipe=plan.recipe,
            train=plan.splits.train,
            held_out=plan.splits.validation,
            image_processor=start.image_processor,
            callbacks=[BestOfBoth(), progress],
            doctor=record.values["training_doctor"],
            on_bad_image=record.values["on_bad_image"],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=newest_checkpoint(plan.output_dir) if record.is_resumed else None)
        except KeyboardInterrupt as error:
            error.add_note(f"{trainer.state.global_step} steps are done; --resume goes on from the newest checkpoint.")
            raise
        except TooManyBadImages as error:  # an error of a worker has a traceback in its text
            raise ValueError(trainer.readable_images.reason_to_stop()) from error
        except torch.OutOfMemoryError as error:
            raise ValueError(memory_sentence(args)) from error
        except MACHINE_ERRORS as error:
            if (sentence := failure_of_the_machine(error, args)) is None:
                raise
            raise ValueError(sentence) from error
        finally:
            progress.close()
    trainer.readable_images.gather()
    if args.process_index == 0 and (bad := trainer.readable_images.bad_images):
        record.values["bad_images"] = bad
        console.print(f"warning: {trainer.readable_images.summary()}", highlight=False)
    return trainer


@contextmanager
def _quiet_about(recipe: Recipe) -> Iterator[None]:
    """Silence the log of departures from the recipe, which the preflight has already shown."""
    logger = logging.getLogger(DinoDetrTrainer.__module__)

    def is_new(entry: logging.LogRecord) -> bool:
        return not entry.getMessage().startswith(f"Departs from the recipe {recipe.name}")

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
