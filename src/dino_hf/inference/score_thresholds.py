"""The default score thresholds of a detector: from its configuration, or from the report that training wrote beside it."""

import re
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig

from ..common.paths import expand_home
from ..common.regular_files import read_json
from ..conversion.published import lookup_published
from ..model.configuration_dino_detr import DinoDetrConfig

DEFAULT_THRESHOLD = 0.5  # of the library, for detectors whose best threshold is not known
RESULTS = "results.json"
EVALUATIONS = Path("outputs/eval")  # default output folder of `dino-hf eval`
_LARGEST = 2**26  # bytes


class ScoreThresholds(NamedTuple):
    """Score thresholds in [0, 1]. Detections with a higher score are kept."""

    default: float
    by_class: dict[str, float]  # class name -> threshold, for classes with a threshold of their own
    origin: str | None  # where they were found; None: the default of the library

    def describe(self) -> str | None:
        """A sentence for the user. None: the default of the library."""
        if self.origin is None:
            return None
        count = len(self.by_class)
        own = f"; {count} {'class has its own' if count == 1 else 'classes have their own'}" if count else ""
        return f"Score threshold {self.default:.3f}{own}, from {self.origin}; --threshold replaces it."


def score_thresholds(config: PreTrainedConfig, folder: str | Path | None = None) -> ScoreThresholds:
    """The score thresholds that a detector uses by default.

    The first that exists counts: the fields `score_threshold` and `class_score_thresholds` of the configuration; `results.json` in
    the folder of the weights, which `dino-hf train` wrote; 0.5.

    Args:
        config: configuration of any detector. Only a DINO detector has the fields.
        folder: the folder that the detector was loaded from. None: only the configuration counts.
    """
    if config.model_type == DinoDetrConfig.model_type:
        threshold = getattr(config, "score_threshold", None)  # code in a repository may be older
        by_class = getattr(config, "class_score_thresholds", None)
        if threshold is not None or by_class:
            return ScoreThresholds(
                DEFAULT_THRESHOLD if threshold is None else threshold, dict(by_class or {}), "the model's configuration"
            )
    if folder is not None and expand_home(folder).is_dir():
        measured = _measured(expand_home(folder), str(folder))
        if measured is not None:
            return ScoreThresholds(measured, {}, str(Path(folder, RESULTS)))
    return ScoreThresholds(DEFAULT_THRESHOLD, {}, None)


def report_folder(model: str) -> Path:
    """The default output folder of `dino-hf eval`. Its name is the Hub id of the model, or the last part of its folder."""
    path = expand_home(model)
    parts = [path.resolve().name] if path.exists() else _title(model).split("/")[-2:]
    return EVALUATIONS / (re.sub(r"[^\w.-]+", "_", "--".join(parts)).strip(".-_")[:100] or "model")


def evaluated_threshold(model: str) -> tuple[float, Path] | None:
    """The best threshold in the report of `dino-hf eval` in the current folder, and the file. None: there is no such report.

    It is only a hint for the user, because it depends on the current folder.
    """
    folder = report_folder(model)
    threshold = _measured(folder, model)
    return None if threshold is None else (threshold, folder / RESULTS)


def _measured(folder: Path, model: str) -> float | None:
    """The best threshold in a report. A report on another model is ignored."""
    try:
        report = read_json(folder / RESULTS, _LARGEST)
        threshold, is_same = report["best_threshold"]["threshold"], _is_same(report["model"], model)
    except (OSError, ValueError, LookupError, TypeError):  # no report, or a damaged one
        return None
    return threshold if is_same and isinstance(threshold, float) and 0 < threshold < 1 else None


def _is_same(reported: str, model: str) -> bool:
    return _title(reported) == _title(model) or expand_home(reported).resolve() == expand_home(model).resolve()


def _title(model: str) -> str:
    """The title of a published checkpoint, which may be named by an alias. Other names are returned unchanged."""
    row = lookup_published(model)
    return model if row is None else row.title


def check_threshold(threshold: float, what: str = "threshold") -> None:
    """Raise ValueError for a threshold that is not in [0, 1].

    Args:
        what: name of the setting in the message.
    """
    if not 0 <= threshold <= 1:  # also refuses NaN
        percent = f" For {threshold:g} %, write {threshold / 100:g}." if 1 < threshold <= 100 else ""
        raise ValueError(f"{what}={threshold} must be in [0, 1], as scores are.{percent}")
