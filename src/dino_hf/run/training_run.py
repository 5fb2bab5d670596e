"""`train`: the whole training run behind `dino-hf train`."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from ..common.output_folders import replace_file
from ..common.progress import hide_library_bars
from ..evaluation import Evaluation
from ..runtime.weights_digest import weights_digest
from ..training.checkpoint_files import check_checkpoint, newest_checkpoint
from ..training.coco_data import CocoData
from ..training.departures import save_recipe
from ..training.num_queries import set_num_queries
from ..training.own_augmentation import OwnAugmentation
from ..training.readable_images import TooManyBadImages
from ..training.recipe import Recipe
from ..training.run_lock import locked_run
from ..training.trainer import DinoDetrTrainer
from .augmentation_choice import choose_augmentation
from .data import read_data, trained_before
from .image_check import leave_out_bad_images
from .machine_failures import MACHINE_ERRORS, machine_failure, memory_sentence
from .old_class_report import keep_old_classes
from .plan import Plan, adapt_recipe
from .preflight import Preflight
from .preparation import prepare
from .progress import BestApMetric, TrainingProgress
from .recipe_choice import choose_recipe
from .record import RunRecord, full_path
from .results import keep_weights, leave_results
from .settings import find_trackers, flat_settings, split_settings
from .starting_model import Start, adapt_start, align_memory, load_checkpoint, load_start
from .tiles import choose_tiles, cut, tile_warnings
from .trained_parts import limit_training, read_freeze, read_lora

PREFLIGHT_NAME = "preflight.json"


class TrainingRun(NamedTuple):
    """Result of `train`."""

    output_dir: Path
    preflight: Preflight
    evaluation: (
        Evaluation | None
    )  # evaluation of the weights in `output_dir` on held-out images; only in the first process
    test: Evaluation | None  # their evaluation on test images; None without test images
    trainer: DinoDetrTrainer | None  # None if nothing was trained: a dry run, or a run that was already finished

    def __repr__(self) -> str:
        return f"TrainingRun({str(self.output_dir)!r:.100}: validation {self.evaluation!r}, test {self.test!r})"


@hide_library_bars()
def train(
    data: Any,
    *,
    model: str | Path | None = None,
    backbone: str | Path | None = None,
    num_queries: int | None = None,
    freeze: str | Sequence[str] | None = None,
    lora: int | Mapping[str, Any] | None = None,
    keep_classes: bool | None = None,
    old_data: Any = None,
    recipe: str | None = None,
    output_dir: str | Path = "outputs/train",
    resume: bool = False,
    batch_size: int | str = "auto",
    report_to: str | Sequence[str] | None = None,
    seed: int | None = None,
    tiles: int | str | tuple[int, int] | None = None,
    tile_overlap: float | None = None,
    empty_tiles: float | None = None,
    validation_fraction: float | None = None,
    box_format: str | None = None,
    allow_outside: bool | None = None,
    trust_boxes: bool | None = None,
    on_bad_image: str | None = None,
    check_images: bool = False,
    augmentation: Any = None,
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
        model: folder, name of a published checkpoint, or id on the Hub of a DINO detector. Classes that it knows by name keep
            their weights. A folder with a configuration and no weights starts from random weights. None: a new detector with 4
            scales on a pretrained backbone.
        backbone: folder, id on the Hub, or timm name of the backbone of a new detector; not together with `model`. Images are
            normalised as in the backbone's training. None: "microsoft/resnet-50".
        num_queries: number of queries, see `set_num_queries`. None: the number of the model, 900 in a new detector.
        freeze: parts that are not trained, such as "backbone" or ["backbone.stage1", "encoder"], see
            `dino_hf.training.freeze`. None: those that are frozen in the model.
        lora: train low-rank adapters of this rank, such as 16, and the class heads; all other weights are frozen. Settings by
            name: {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}, see `dino_hf.training.add_lora`; `lora_alpha` is twice
            the rank by default. Checkpoints hold adapters. The output folder and `last/` hold plain models, with the
            adapters merged into the weights. None: no adapters.
        keep_classes: keep the classes of `model` that the data do not annotate, beside the classes of the data. Before training,
            `model` detects its own classes in the training and held-out images, and these boxes become annotations; see
            `OldClasses`. Weights are chosen by the mean of the AP of these classes and the AP of the others. None: False, the
            classes are those of the data.
        old_data: data as `data`, annotated with classes that are kept. Their AP is measured before and after training, on the
            part that `dino_hf.evaluate` chooses. None: the agreement with `model` on held-out images is measured.
        recipe: a name of `RECIPES`. None: "finetune" for a trained detector, "from-backbone" if only the backbone is pretrained,
            "scratch" for random weights.
        output_dir: a new or empty folder, or the folder of the run to resume.
        resume: continue from the newest whole checkpoint. Settings that are not given are taken from the earlier run. Without a
            checkpoint, start from the beginning. For a finished run, only the results are written again.
        batch_size: images per batch and process, or "auto": as many as fit. Batches are accumulated until a step has the number
            of images of the recipe.
        report_to: trackers, "tensorboard", "wandb", "trackio", or "none"; None: TensorBoard, if it is installed.
        seed: random seed, also for a split of the data. None: 0.
        tiles: side or (width, height) in pixels. Larger images are cut into overlapping tiles, which are trained on with the whole
            images, see `cut_into_tiles`. AP is measured on whole images, with merged detections. None: no tiles.
        tile_overlap: overlap of neighbouring tiles, relative to their side. None: 0.2.
        empty_tiles: most tiles without boxes in an epoch, for each tile or image with boxes. None: 1.
        validation_fraction: share of the training images to hold out if there are no validation images. None: 0.2.
        box_format: layout of the boxes, for data that do not state it, see `load_data`.
        allow_outside: also read files outside of the data set's folder. None: False.
        trust_boxes: do not check the layout of the boxes. None: False.
        on_bad_image: "skip": leave out, with a warning, images that cannot be read or have another size than annotated. If
            training finds a bad image later, another image takes its place, and `run.json` lists it in `bad_images`. If more than
            a tenth of the images are bad, this is an error. "raise": stop. None: "skip".
        check_images: decode all images before the first step, which finds truncated files. By default, validation and test
            images and up to 2,000 training images are decoded. With more training images, only the start of each file is read.
        augmentation: your own augmentation of training images, applied before the recipe's: an object, see `OwnAugmentation`, or
            the name of one, see `load_own_augmentation`. A resumed run needs it again. None: only the recipe's augmentation.
        training_doctor: log the findings of `TrainingDoctor`. None: True.
        dry_run: stop before training; nothing is written.
        settings: fields of `Recipe`, of its `Augmentation` and `model_settings`, and of `TrainingArguments`, by name. By default,
            training images have the sizes of the model's image processor.
    Raises:
        ValueError, FileNotFoundError, OSError, ImportError: the message is one sentence with the reason and the remedy.
    """
    from ..evaluation import report  # noqa: F401  here: it needs matplotlib, and a missing one must stop the run now

    if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'batch_size={batch_size!r} must be a number of images, or "auto".')
    RunRecord.open(Path(output_dir), resume)  # checks the folder before a lock is written to it
    with nullcontext() if dry_run else locked_run(Path(output_dir), os.environ.get("RANK", "0") == "0"):
        record = RunRecord.open(Path(output_dir), resume)
        trained = (read_freeze(freeze), read_lora(lora))
        record.choose_start(model, backbone, num_queries, *trained, keep_classes or None)
        choose_tiles(record, tiles, tile_overlap, empty_tiles)
        record.values["source"] = full_path(data) if isinstance(data, str | Path) else record.recorded.get("source")
        record.choose(
            {
                "recipe": recipe,
                "seed": seed,
                "validation_fraction": validation_fraction,
                "box_format": box_format,
                "report_to": None if report_to is None else find_trackers(report_to),
                "on_bad_image": on_bad_image,
                "allow_outside": allow_outside,
                "trust_boxes": trust_boxes,
                "training_doctor": training_doctor,
            }
        )
        if record.values["report_to"] is None:
            record.values["report_to"] = find_trackers(None)
        if record.values["on_bad_image"] not in ("skip", "raise"):
            raise ValueError(f'on_bad_image={record.values["on_bad_image"]!r} must be "skip" or "raise".')
        own = choose_augmentation(record, augmentation)
        other = {"own": own, "resume": resume, "check_images": check_images, "dry_run": dry_run}
        return _train(data, old_data, record, batch_size, settings, **other)


def _train(
    data: Any,
    old_data: Any,
    record: RunRecord,
    batch_size: int | str,
    settings: dict[str, Any],
    *,
    own: OwnAugmentation | None,
    resume: bool,
    check_images: bool,
    dry_run: bool,
) -> TrainingRun:
    console, output_dir = Console(), record.output_dir
    given = record.add_settings(flat_settings(settings))
    if record.values["recipe"] is None:
        with _noting_missing_run(record, resume):
            record.values["recipe"] = choose_recipe(record.values["model"])
    recipe, others = split_settings(record.values["recipe"], given)

    use_cpu = others.get("use_cpu", not torch.accelerator.is_available())
    annotated, findings = read_data(data, record, use_cpu)
    annotated, bad_images = leave_out_bad_images(annotated, record.values["on_bad_image"], check_images)
    findings += bad_images
    old, old_data = keep_old_classes(record, annotated, old_data, use_cpu, console)
    splits = annotated if old is None else old.add_to(annotated)
    if resume and not record.is_resumed:
        findings.insert(0, f"there is no run in {output_dir} to resume: this one starts from the beginning.")
    with _noting_missing_run(record, resume):
        start = _load(record, splits.train, recipe, "nms" in given, [] if old is None else old.notes())
    if not record.is_resumed:
        findings += trained_before(start.model, splits)
    recipe = adapt_recipe(recipe, given, start.image_processor, splits.validation is not None)
    recipe.configure(start.model)
    if not record.is_finished:
        start, warnings = limit_training(start, *(record.values[name] for name in ("freeze", "lora", "seed")))
        findings += warnings
    tiled = cut(splits, record.values)
    findings += tile_warnings(tiled.train, start.image_processor)
    arguments = others | {"seed": record.values["seed"], "report_to": record.values["report_to"] or "none"}
    plan = Plan(recipe, arguments, record.output_dir, tiled, own, None if old is None else old.groups)
    args, preflight = prepare(plan, record, start, batch_size, findings)
    if record.is_finished and (changes := record.changes()):
        raise ValueError(
            f"The run in {output_dir} is finished, so its settings cannot change: {changes[0]} To train further, start another run "
            f"with --model {output_dir}."
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
            if old is not None:
                old.write(output_dir)
            with replace_file(output_dir / PREFLIGHT_NAME) as path:
                path.write_text(json.dumps(preflight.as_dict(), indent=2) + "\n", encoding="utf-8")
        trainer = _run_trainer(plan, start, args, record, console)
    if not is_first:
        return TrainingRun(record.output_dir, preflight, None, None, trainer)
    try:
        if trainer is not None:
            keep_weights(trainer, record, plan.groups)
        evaluation, test = leave_results(record, annotated, args, console, old, old_data)
    except KeyboardInterrupt as error:
        error.add_note("All steps are done; --resume continues with the evaluation.")
        raise
    record.values["finished"] = True
    record.write()
    return TrainingRun(record.output_dir, preflight, evaluation, test, trainer)


@contextmanager
def _noting_missing_run(record: RunRecord, resume: bool) -> Iterator[None]:
    """Add to the error of a model that cannot be read that there is no run to resume."""
    try:
        yield
    except OSError as error:
        if resume and not record.is_resumed:
            raise OSError(
                f"There is no run in {record.output_dir} to resume, and a new one cannot start. {error}"
            ) from error
        raise


def _load(record: RunRecord, train: CocoData, recipe: Recipe, is_nms_chosen: bool, notes: Sequence[str] = ()) -> Start:
    """The model that a run starts from. A resumed run starts from its newest checkpoint, a finished run from its result.

    Args:
        is_nms_chosen: see `adapt_start`.
        notes: more notes for the plan.
    """
    checkpoint = str(record.output_dir) if record.is_finished else newest_checkpoint(record.output_dir)
    is_whole = record.is_finished or not record.values["lora"]  # otherwise checkpoints hold only adapters
    if record.is_resumed and checkpoint is not None and is_whole:
        if not record.is_finished:
            check_checkpoint(Path(checkpoint))
        start = load_checkpoint(checkpoint, record.recorded["start"], record.recorded["start_notes"])
    else:
        source, seed, backbone = (record.values[name] for name in ("model", "seed", "backbone"))
        start = load_start(source, train, seed, backbone, recipe.architecture)
        if (num_queries := record.values["num_queries"]) is not None:
            start.notes.append(f"{num_queries} queries instead of {start.model.config.num_queries}")
            set_num_queries(start.model, num_queries)
        start.notes.extend([*notes, *adapt_start(start, recipe, is_nms_chosen)])
        record.values |= {"start": start.source, "start_notes": start.notes}
        if record.values["lora"]:
            record.check_weights(weights_digest(start.model))
            if checkpoint is not None:
                check_checkpoint(Path(checkpoint))
    start.notes.extend(note for note in adapt_start(start, recipe, is_nms_chosen) if note not in start.notes)
    align_memory(start.model)
    return start


def _run_trainer(plan: Plan, start: Start, args: TrainingArguments, record: RunRecord, console: Console):
    progress = TrainingProgress(console, plan.groups)
    with _departures_not_logged():
        trainer = DinoDetrTrainer(
            start.model,
            args,
            recipe=plan.recipe,
            train=plan.splits.train,
            held_out=plan.splits.validation,
            image_processor=start.image_processor,
            callbacks=[BestApMetric(plan.groups), progress],
            doctor=record.values["training_doctor"],
            on_bad_image=record.values["on_bad_image"],
            augmentation=plan.augmentation,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=newest_checkpoint(plan.output_dir) if record.is_resumed else None)
        except KeyboardInterrupt as error:
            error.add_note(
                f"{trainer.state.global_step} steps are done; --resume continues from the newest checkpoint."
            )
            raise
        except TooManyBadImages as error:  # the text of a worker's error has a traceback
            raise ValueError(trainer.readable_images.reason_to_stop()) from error
        except torch.OutOfMemoryError as error:
            raise ValueError(memory_sentence(args)) from error
        except MACHINE_ERRORS as error:
            if (sentence := machine_failure(error, args)) is None:
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
def _departures_not_logged() -> Iterator[None]:
    """Silence the log of departures from the recipe, which the preflight has already shown."""
    logger = logging.getLogger(save_recipe.__module__)

    def is_new(entry: logging.LogRecord) -> bool:
        return not entry.getMessage().startswith("Departs from the recipe")

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
