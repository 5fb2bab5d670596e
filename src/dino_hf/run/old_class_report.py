"""AP of old and new classes before and after a run with `keep_classes`: measured, printed and recorded for the model card."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.text import list_some
from ..data import DetectionData
from ..data.rows import CocoData
from ..evaluation import Evaluation, evaluate_model
from ..evaluation.seen_images import load_split
from ..inference.predictor import Predictor
from ..training.kept_classes import KeptClasses, add_boxes, select_classes
from .old_classes import OldClasses, find_old_classes
from .record import RunRecord, full_path
from .starting_model import load_trained

AP_CLASS = "AP_class_"  # prefix of the metric of a class


def keep_old_classes(
    record: RunRecord, splits: DetectionData, old_data: Any, use_cpu: bool, console: Console
) -> tuple[OldClasses | None, CocoData | None]:
    """The old classes of a run with `keep_classes`, and the data to measure them on. None: there are none.

    Args:
        old_data: as in `train`. None: as recorded.
    Raises:
        ValueError, OSError: see `find_old_classes` and `load_old_data`.
    """
    values = record.values
    values["old_data"] = record.recorded.get("old_data")
    if not values["keep_classes"]:
        if old_data is not None:
            raise ValueError("--old-data measures the classes that --keep-classes keeps: add --keep-classes.")
        return None, None
    if isinstance(old_data, str | Path):
        values["old_data"] = full_path(old_data)
    old = find_old_classes(record, splits, use_cpu, console)
    old_data = values["old_data"] if old_data is None else old_data
    return old, None if old_data is None or not old.classes.old else load_old_data(record, old_data, old.classes)


def load_old_data(record: RunRecord, old_data: Any, classes: KeptClasses) -> CocoData:
    """Images annotated with old classes, without other classes.

    Args:
        record: of the run, with its settings for reading data.
        old_data: as in `train`.
    Raises:
        ValueError, OSError: the data cannot be read, the old detector was trained on them, or they have no old class.
    """
    settings = record.values
    reading = {name: settings[name] for name in ("box_format", "allow_outside", "trust_boxes")}
    model, _ = load_trained(settings["model"])
    data, _ = load_split(old_data, models=[model], log=False, **reading)
    selected = select_classes(data, classes.old)
    if not selected.id2label or not any(objects["category"] for objects in selected.dataset["objects"]):
        raise ValueError(
            f"--old-data {data.name or 'from Python'} has no object of the old classes: {list_some(classes.old, 10)}. Its classes "
            f"are {list_some(list(data.id2label.values()), 10)}. Name data that are annotated with old classes, or leave it out."
        )
    return selected


def report_old_classes(
    record: RunRecord,
    old: OldClasses,
    predictor: Predictor,
    validation: CocoData | None,
    held_out: Evaluation | None,
    old_data: CocoData | None,
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Measure old classes after training, and old and annotated classes before it.

    With `old_data`, the AP of old classes is measured on annotations. Otherwise detections of the old detector serve as ground
    truth of the held-out images: this agreement is no AP, because the old detector also errs.

    Args:
        predictor: the trained detector.
        validation, held_out: the held-out images with the classes of the data, and their evaluation.
        batch_size, progress: see `evaluate_model`.
    Returns:
        `classes`, `is_agreement`, `dataset`, `num_images`, `metrics` and `intervals` of the old classes, `before` (their metrics
        before training; {} if not measured), `others_before` (metrics of annotated classes before training), and `missing` (why
        nothing was measured before training, or None). The metrics are {} if no image shows an old class.
    """
    settings = {"batch_size": batch_size, "progress": progress}
    report = {"classes": old.classes.old, "is_agreement": old_data is None, "dataset": None, "num_images": None}
    report |= {"metrics": {}, "intervals": {}, "before": {}, "others_before": {}, "missing": None}
    shared = None if held_out is None or not old.classes.shared else select_classes(validation, old.classes.shared)
    before = None
    if old_data is not None or shared is not None:
        try:
            before = Predictor(*load_trained(record.values["model"]), device=predictor.device)
        except (OSError, ValueError) as error:  # moved or changed during training, whose results must not be lost
            report["missing"] = f"The AP before training is not known. {error}"
    data = old_data
    if data is None and validation is not None:
        found = add_boxes(validation, old.classes, old.boxes["validation"], with_annotations=False)
        data = select_classes(found, old.classes.old) if any(old.boxes["validation"].values()) else None
    if data is not None:
        evaluation = evaluate_model(predictor, data, **settings)
        report |= {"dataset": data.name, "num_images": len(data.dataset), "metrics": _measured(evaluation)}
        report["intervals"] = {name: [float(bound) for bound in pair] for name, pair in evaluation.intervals.items()}
    if before is not None and old_data is not None:
        report["before"] = _measured(evaluate_model(before, old_data, num_bootstrap=0, **settings))
    if before is not None and shared is not None:
        report["others_before"] = _measured(evaluate_model(before, shared, num_bootstrap=0, **settings))
    return report


def _measured(evaluation: Evaluation) -> dict[str, float]:
    """AP, AP50, AP75 and the AP of each class, without those that have no ground truth."""
    return {
        name: float(value)
        for name, value in evaluation.metrics.items()
        if value >= 0 and (name in ("AP", "AP50", "AP75") or name.startswith(AP_CLASS))
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """Sentences about old classes for the terminal."""
    names = list_some(report["classes"], 10)
    metrics, before, images = report["metrics"], report["before"].get("AP"), report["num_images"]
    lines = []
    if not metrics:
        lines.append(f"Old classes ({names}): not measured, because no held-out image shows one to the old detector.")
    elif report["is_agreement"]:
        lines.append(
            f"Old classes ({names}): agreement {metrics['AP']:.3f} with the old detector on {images} held-out images. It is no "
            "AP on annotations: boxes of the old detector are the ground truth. --old-data measures AP."
        )
    else:
        text = f"Old classes ({names}): AP {metrics['AP']:.3f} on {images} annotated images"
        lines.append(f"{text}." if before is None else f"{text}; it was {before:.3f} before training.")
    if report["missing"] is not None:
        lines.append(report["missing"])
    if (shared := report["others_before"].get("AP")) is not None:
        known = [name.removeprefix(AP_CLASS) for name in report["others_before"] if name.startswith(AP_CLASS)]
        lines.append(f"Before training, the held-out AP of {list_some(known, 10)} was {shared:.3f}.")
    return lines
