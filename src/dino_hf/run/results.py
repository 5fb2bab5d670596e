"""Results of a run in its folder: the best and the last weights, their evaluation, curves and a model card."""

import csv
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..common.progress import ProgressBar
from ..data import DetectionData
from ..evaluation import Evaluation, evaluate_model
from ..evaluation.kept_thresholds import best_thresholds
from ..inference.loading import load_detector, load_image_processor
from ..inference.predictor import Predictor
from ..runtime.model_card import write_model_card
from ..runtime.weights_digest import weights_digest
from ..training.checkpoint_files import newest_checkpoint
from ..training.coco_data import CocoData
from ..training.ema import EMA_FOLDER, ModelEma
from ..training.kept_classes import ClassGroups
from ..training.lora import merge_adapters
from ..training.trainer import DinoDetrTrainer
from .old_class_report import report_old_classes, summary_lines
from .old_classes import OldClasses
from .progress import BEST_AP, ap_of
from .record import RunRecord

LAST_FOLDER, TEST_FOLDER = "last", "test"
CURVES_NAME, HISTORY_JSON, HISTORY_CSV = "curves.png", "history.json", "history.csv"
_PICTURES = {
    CURVES_NAME: "Loss, AP and learning rates during training",
    "precision_recall.png": "Precision over recall",
    "f1.png": "F1 over the score threshold, and the best threshold",
    "confusion.png": "Confusion matrix",
    "ap_per_class.png": "AP of each class, with 95 % intervals",
    "ap_per_size.png": "AP by size of objects, with 95 % intervals",
    "mistakes.png": "The worst false positives and missed objects",
}


def keep_weights(trainer: DinoDetrTrainer, record: RunRecord, groups: ClassGroups | None = None) -> None:
    """Save the best weights, raw or averaged, in the output folder, and the weights of the last step in `last`.

    Args:
        groups: classes of a run that keeps old classes.
    """
    newest = Path(newest_checkpoint(record.output_dir))
    source, description = _best(trainer.state, trainer.args, newest, groups)
    record.values["weights"] = description
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    _save(model, source, record.output_dir, description)
    _save(model, newest, record.output_dir / LAST_FOLDER, f"those after the last step, {trainer.state.global_step}")


def _best(
    state: TrainerState, args: TrainingArguments, newest: Path, groups: ClassGroups | None = None
) -> tuple[Path, str]:
    """Folder of the best weights, and a description of them."""
    evaluations = [entry for entry in state.log_history if "eval_AP" in entry]
    best = newest.with_name(f"checkpoint-{state.best_global_step}")
    if not evaluations or not best.is_dir():
        is_average = ModelEma.is_saved(newest / EMA_FOLDER)
        description = (
            f"{_kind(is_average)} after the last step, {state.global_step}; there was no evaluation to choose by"
        )
        return (newest / EMA_FOLDER if is_average else newest), description
    scores = next(entry for entry in reversed(evaluations) if entry["step"] == state.best_global_step)
    metric = args.metric_for_best_model.removeprefix("eval_")
    is_average = metric.startswith("ema_")
    if metric == BEST_AP:
        metric = "AP" if groups is None else "the mean of the AP of old classes and the AP of the others"
        is_average = ap_of(scores, "eval_ema_", groups) > ap_of(scores, "eval_", groups)
    is_average = is_average and ModelEma.is_saved(best / EMA_FOLDER)
    description = f"{_kind(is_average)} after step {state.best_global_step}, the best of {len(evaluations)} evaluations by {metric}"
    return (best / EMA_FOLDER if is_average else best), description


def _kind(is_average: bool) -> str:
    return "the average of the weights" if is_average else "those"


def _save(trained: nn.Module, source: Path, folder: Path, selected: str) -> None:
    """Save the weights of a checkpoint as a model in `folder`.

    Args:
        trained: if it has adapters, those of the checkpoint are merged into its weights.
        source: folder of a checkpoint, or of the averaged weights in it.
    """
    model = load_detector(source) if isinstance(trained, PreTrainedModel) else merge_adapters(trained, source)
    if training := (model.config.provenance or {}).get("training"):
        training["selected"] = selected
    load_image_processor(source).save_pretrained(folder)
    model.save_pretrained(folder)


def leave_results(
    record: RunRecord,
    splits: DetectionData,
    args: TrainingArguments,
    console: Console,
    old: OldClasses | None = None,
    old_data: CocoData | None = None,
) -> tuple[Evaluation | None, Evaluation | None]:
    """Evaluate the weights in the output folder on held-out and test images, and write reports, curves and the model card.

    Args:
        splits: with the classes and boxes of the data set.
        old: the classes that the run keeps, which are measured too.
        old_data: images annotated with old classes.
    Returns:
        the evaluations on held-out and on test images, each None without images.
    """
    from ..evaluation.report import save_report  # here: it needs matplotlib

    folder = record.output_dir
    if checkpoint := newest_checkpoint(folder):  # the user may have deleted the checkpoints of a finished run
        _write_history(folder, TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))))
    predictor = Predictor(folder, device=args.device)
    evaluations: list[Evaluation | None] = []
    parts, batch_size = (splits.validation, splits.test), args.per_device_eval_batch_size
    for data in parts:
        evaluation = None
        if data is not None:
            with ProgressBar(console) as bar:
                settings = {"batch_size": batch_size, "check_trained": False}
                evaluation = evaluate_model(predictor, data, progress=bar, **settings)
        evaluations.append(evaluation)
    held_out, test = evaluations
    predictor.model.config.set_thresholds(*((None, None) if held_out is None else best_thresholds(held_out)))
    report = None
    if old is not None and old.classes.old:
        measured = (splits.validation, held_out, old_data)
        with ProgressBar(console) as bar:
            report = report_old_classes(record, old, predictor, *measured, batch_size=batch_size, progress=bar)
        record.values["old_classes"] = report
        if held_out is not None:
            held_out.old_classes = report
    for evaluation, data, target in zip(evaluations, parts, (folder, folder / TEST_FOLDER), strict=True):
        if evaluation is not None:
            save_report(evaluation, data, target)
    if held_out is not None:
        _record_evaluation(predictor.model, held_out, splits.validation, test, splits.test)
    config, digest = predictor.model.config, weights_digest(predictor.model)
    config.save_pretrained(folder)
    write_model_card(folder, config, predictor.model.num_parameters(), weights=digest)
    _print_summary(record, held_out, test, console, report)
    return held_out, test


def _record_evaluation(
    model, held_out: Evaluation, data: CocoData, test: Evaluation | None, test_data: CocoData | None
) -> None:
    """Replace the evaluation of training by this evaluation, for the model card."""
    training = model.config.provenance["training"]
    step = (training.get("evaluation") or {}).get("step", training.get("steps"))
    evaluation = _for_card(held_out, data) | {
        "step": step,
        "weights": weights_digest(model),
        "after_training": True,
        "objects": {row["name"]: row["num_objects"] for row in held_out.per_class},
        "pictures": _PICTURES,
    }
    if held_out.best is not None:
        evaluation["best"] = held_out.best._asdict()
    if test is not None:
        evaluation["test"] = _for_card(test, test_data)
    if held_out.old_classes is not None:
        evaluation["old_classes"] = held_out.old_classes
    training["evaluation"] = evaluation


def _for_card(evaluation: Evaluation, data: CocoData) -> dict[str, Any]:
    return {
        "dataset": data.name,
        "num_images": len(data.dataset),
        "metrics": {name: float(value) for name, value in evaluation.metrics.items()},
        "intervals": {name: [float(bound) for bound in bounds] for name, bounds in evaluation.intervals.items()},
    }


def _write_history(folder: Path, state: TrainerState) -> None:
    """Write the log as JSON, as a table with one row for each step, and as plots."""
    from .curves import save_curves  # imported here, because it needs matplotlib

    text = json.dumps(state.log_history, indent=2) + "\n"
    (folder / HISTORY_JSON).write_text(text, encoding="utf-8")
    rows: dict[int, dict[str, Any]] = {}
    for entry in state.log_history:
        rows.setdefault(entry["step"], {}).update(entry)
    columns = dict.fromkeys(["step", "epoch", *(name for row in rows.values() for name in row)])
    with (folder / HISTORY_CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows.values())
    save_curves(folder / CURVES_NAME, state)


def _print_summary(
    record: RunRecord,
    held_out: Evaluation | None,
    test: Evaluation | None,
    console: Console,
    old_classes: dict[str, Any] | None,
) -> None:
    folder = record.output_dir
    lines = [f"{folder} has the best weights: {record.values['weights']}."]
    for evaluation, part in ((held_out, "held-out"), (test, "test")):
        if evaluation is not None:
            low, high = evaluation.intervals.get("AP", (None, None))
            interval = "" if low is None else f" (95 % interval {low:.3f} to {high:.3f})"
            lines.append(
                f"AP {evaluation.metrics['AP']:.3f}{interval}, AP50 {evaluation.metrics['AP50']:.3f} on "
                f"{evaluation.counts['images']} {part} images."
            )
    if old_classes is not None:
        lines += summary_lines(old_classes)
    lines.append(f"Look at {folder / 'README.md'} and {folder / CURVES_NAME}.")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
