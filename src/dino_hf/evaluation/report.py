"""Write the files of an evaluation or a comparison into a folder."""

import csv
import json
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..common.drawing import plot_style
from ..common.output_folders import check_output_folder, replace_file
from ..common.paths import remove_files
from ..common.regular_files import read_json
from ..common.text import csv_cell
from ..data.rows import CocoData
from . import mistakes_page, plots
from .compare import Comparison
from .result import Evaluation

_PACKAGES = ("dino_hf", "torch", "transformers", "pycocotools", "numpy")
_COLUMNS = (
    "name",
    "category_id",
    "num_objects",
    "num_images",
    "AP",
    "AP_low",
    "AP_high",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_100",
    "best_threshold",
    "best_f1",
    "precision",
    "recall",
)
_BOUNDED = (
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
)  # the columns with their bounds stand at the end of a row
FILES = (
    "results.json",
    "results.csv",
    "detections.json",
    "precision_recall.png",
    "f1.png",
    "confusion.png",
    "ap_per_class.png",
    "ap_per_size.png",
    "mistakes.png",
)
COMPARISON_FILES = ("compare.json", "compare.png")
COMPARED = "compared"  # folder with the report of the other detector


def save_report(evaluation: Evaluation, data: CocoData, folder: Path) -> list[Path]:
    """Write numbers, detections and plots. Existing files with these names are replaced only when all new ones are complete.

    - `results.json`: all numbers. A number without ground truth is null.
    - `results.csv`: a row for all classes together, then a row for each class
    - `detections.json`: COCO's list of results, with the original ids
    - `precision_recall.png`, `f1.png`, `confusion.png`, `ap_per_class.png`, `ap_per_size.png`, `mistakes.png`

    Args:
        data: the evaluated data. Mistakes are drawn on its images.
        folder: it is created if it does not exist.
    Returns:
        the paths, in this order.
    """
    writers: list[Callable[[Path], None]] = [
        lambda path: _write_json(path, evaluation.as_dict() | {"versions": _versions()}),
        lambda path: _write_table(path, evaluation),
        lambda path: _write_detections(path, evaluation),
        lambda path: plots.save_precision_recall(path, evaluation),
        lambda path: plots.save_f1(path, evaluation),
        lambda path: plots.save_confusion(path, evaluation),
        lambda path: plots.save_ap_per_class(path, evaluation),
        lambda path: plots.save_ap_per_size(path, evaluation),
        lambda path: mistakes_page.save_mistakes(path, evaluation, data),
    ]
    paths = _write_all(folder, dict(zip(FILES, writers, strict=True)))
    # These files may be left of an earlier report with a comparison.
    remove_files(folder, (*COMPARISON_FILES, *(f"{COMPARED}/{name}" for name in FILES)))
    return paths


def save_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `compare.json` and `compare.png`, as `save_report` does.

    Returns:
        the paths.
    """
    writers: list[Callable[[Path], None]] = [
        lambda path: _write_json(path, comparison.as_dict() | {"versions": _versions()}),
        lambda path: plots.save_comparison_plot(path, comparison),
    ]
    return _write_all(folder, dict(zip(COMPARISON_FILES, writers, strict=True)))


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """Check, before the evaluation, that a report can be written into a folder.

    Raises:
        FileExistsError: the folder has an earlier report and `overwrite` is False, or it has other files.
        OSError: the folder cannot be written.
    """
    check_output_folder(folder, overwrite, lambda place: _is_report(place / "results.json"), "an evaluation")


def _is_report(path: Path) -> bool:
    try:
        return "dino_hf" in read_json(path)["versions"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write_all(folder: Path, writers: dict[str, Callable[[Path], None]]) -> list[Path]:
    """Write all files under other names, then rename them. After a failure, an earlier report is unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, plot_style():
        drafts = [stack.enter_context(replace_file(folder / name)) for name in reversed(writers)]
        for draft, write in zip(reversed(drafts), writers.values(), strict=True):
            write(draft)
    return [folder / name for name in writers]


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(
        text, encoding="utf-8", errors="backslashreplace"
    )  # the name of a model's folder may not be valid UTF-8


def _write_detections(path: Path, evaluation: Evaluation) -> None:
    path.write_text(json.dumps(evaluation.detections), encoding="utf-8")


def _write_table(path: Path, evaluation: Evaluation) -> None:
    bounds = [f"{name}_{end}" for name in _BOUNDED for end in ("low", "high")]
    best, counts = evaluation.best, evaluation.counts
    together = {
        "name": "all",
        "category_id": None,
        "num_objects": counts["objects"],
        "num_images": len(np.unique(evaluation.truth["image_id"][evaluation.truth["iscrowd"] == 0])),
        **{name: evaluation.metrics[name] for name in ("AP", *_BOUNDED, "AR_100")},
        "intervals": evaluation.intervals,
        "best_threshold": None if best is None else best.threshold,
        "best_f1": None if best is None else best.f1,
        "precision": None if best is None else best.precision,
        "recall": None if best is None else best.recall,
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_COLUMNS, *bounds])
        writer.writeheader()
        for row in (together, *evaluation.per_class):
            values = {
                f"{name}_{end}": pair[index]
                for name in ("AP", *_BOUNDED)
                if (pair := row["intervals"].get(name))
                for index, end in enumerate(("low", "high"))
            }
            values |= {name: row[name] for name in _COLUMNS if name in row}
            absent = [name for name in ("AP", *_BOUNDED, "AR_100") if values[name] == -1]
            values["name"] = csv_cell(row["name"])
            writer.writerow(values | dict.fromkeys(absent, "none"))


def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}
