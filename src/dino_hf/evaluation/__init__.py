"""Evaluate any detector: COCO's numbers with intervals, plots of its mistakes, and comparisons of two detectors."""

from importlib import import_module
from pathlib import Path

from .compare import Comparison, Difference, compare
from .evaluate import evaluate, evaluate_model
from .evaluator import CocoEvaluator
from .result import Evaluation
from .seen_images import load_split

# The folder of the metric, as text: `evaluate.load(COCO_METRIC)`.
COCO_METRIC = str(Path(__file__).with_name("coco_detection"))

# Imported at first use: the report needs matplotlib, and the metric needs the library `evaluate`.
_LAZY = {"CocoDetectionMetric": ".coco_detection.coco_detection", "save_report": ".report"}

__all__ = [
    "COCO_METRIC",
    "CocoDetectionMetric",
    "CocoEvaluator",
    "Comparison",
    "Difference",
    "Evaluation",
    "compare",
    "evaluate",
    "evaluate_model",
    "load_split",
    "save_report",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
