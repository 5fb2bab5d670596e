"""Evaluation of any detector: COCO's numbers with intervals, pictures of what goes wrong, and whether another one is better.

`report` and `plots`, which need matplotlib, are imported when they are needed.
"""

from .compare import Comparison, Difference, compare
from .evaluate import evaluate, evaluate_model
from .result import Evaluation
from .seen_images import load_split

__all__ = [
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
    if name == "save_report":
        from .report import save_report

        return save_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
