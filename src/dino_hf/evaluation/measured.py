"""Read the results of earlier evaluations of a model."""

import re
from pathlib import Path
from typing import NamedTuple

from ..common.paths import expand_home
from ..common.regular_files import read_json
from ..conversion.published import lookup_published

RESULTS = "results.json"
EVALUATIONS = Path("outputs/eval")  # default output folder of `dino-hf eval`
_LARGEST = 2**26  # bytes


class MeasuredThreshold(NamedTuple):
    threshold: float  # threshold with the best F1, in [0, 1]
    path: Path  # file of the report


def report_folder(model: str) -> Path:
    """The default output folder of `dino-hf eval`. Its name is the Hub id of the model, or the last part of its folder."""
    path = expand_home(model)
    parts = [path.resolve().name] if path.exists() else _title(model).split("/")[-2:]
    return EVALUATIONS / (re.sub(r"[^\w.-]+", "_", "--".join(parts)).strip(".-_")[:100] or "model")


def measured_threshold(model: str) -> MeasuredThreshold | None:
    """The best score threshold of a model, from the report that training wrote beside it, else from the report of `dino-hf eval`.

    Args:
        model: folder, name of a published checkpoint, or id on the Hub. A report that names another model is ignored.
    """
    for folder in (expand_home(model), report_folder(model)):
        try:
            report = read_json(folder / RESULTS, _LARGEST)
            threshold = report["best_threshold"]["threshold"]
            names_model = _same(report["model"], model)
        except (OSError, ValueError, LookupError, TypeError):  # no report, or a damaged one
            continue
        if names_model and isinstance(threshold, float) and 0 < threshold < 1:
            return MeasuredThreshold(threshold, folder / RESULTS)
    return None


def _same(one: str, other: str) -> bool:
    return _title(one) == _title(other) or expand_home(one).resolve() == expand_home(other).resolve()


def _title(model: str) -> str:
    """The title of a published checkpoint, which may be named by an alias. Other names are returned unchanged."""
    row = lookup_published(model)
    return model if row is None else row.title
