"""Precision over recall, F1 over the score threshold, and the threshold with the best F1. All at an IoU of 0.5."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .matching import RECALLS, ClassMatches

THRESHOLDS = np.linspace(0, 1, 501)  # for drawn curves; the best threshold is searched among all scores


class Best(NamedTuple):
    """The score threshold with the highest F1. Detections with a higher score are kept. It is the middle of two scores."""

    threshold: float
    f1: float
    precision: float
    recall: float


class Curves(NamedTuple):
    """Curves of K classes at an IoU of 0.5, for objects of all sizes."""

    recalls: np.ndarray  # (R,) 0, 0.01, ..., 1
    precision: np.ndarray  # (K, R) the highest precision at this recall or above; NaN for a class without objects
    thresholds: np.ndarray  # (S,)
    f1: np.ndarray  # (S,) for all classes together
    class_f1: np.ndarray  # (K, S); NaN for a class without objects
    best: Best | None  # for all classes together; None if no object was found
    class_best: list[Best | None]

    @property
    def mean_precision(self) -> np.ndarray:
        """(R,) The mean over the classes that have objects. NaN if none has."""
        known = self.precision[~np.isnan(self.precision[:, 0])]
        return known.mean(axis=0) if len(known) else np.full(len(self.recalls), np.nan)


def make_curves(matches: Sequence[ClassMatches], precision: np.ndarray) -> Curves:
    """Make the curves of all classes.

    Args:
        matches: matches of each class.
        precision: (K, R) precision of pycocotools at an IoU of 0.5; -1 for a class without objects.
    """
    rankings = []
    for of_class in matches:
        is_true, counts = of_class.is_true()
        rankings.append((of_class.scores[counts], is_true[counts], len(of_class.objects[0])))
    scores, is_true = (np.concatenate([ranking[part] for ranking in rankings]) for part in (0, 1))
    order = np.argsort(-scores, kind="stable")
    together = scores[order], is_true[order], sum(count for *_, count in rankings)
    return Curves(
        recalls=RECALLS,
        precision=np.where(precision < 0, np.nan, precision),
        thresholds=THRESHOLDS,
        f1=_f1_at(*together),
        class_f1=np.stack([_f1_at(*ranking) for ranking in rankings]),
        best=best_threshold(*together),
        class_best=[best_threshold(*ranking) for ranking in rankings],
    )


def _f1_at(scores: np.ndarray, is_true: np.ndarray, num_objects: int) -> np.ndarray:
    """(S,) F1 at each of the `THRESHOLDS`; NaN without objects. Scores are in falling order."""
    if not num_objects:
        return np.full(len(THRESHOLDS), np.nan)
    num_kept = np.searchsorted(-scores, -THRESHOLDS, side="left")  # number of scores above the threshold
    num_true = np.concatenate([[0], np.cumsum(is_true)])[num_kept]
    return 2 * num_true / (num_kept + num_objects)


def best_threshold(scores: np.ndarray, is_true: np.ndarray, num_objects: int) -> Best | None:
    """The threshold with the highest F1. None: no detection is true.

    Args:
        scores: (D,) in falling order.
        is_true: (D,) bool: whether each detection is a true positive.
        num_objects: number of objects to find.
    """
    num_true = np.cumsum(is_true)
    if not num_objects or not num_true.size or not num_true[-1]:
        return None
    is_last_of_ties = np.append(scores[1:] < scores[:-1], True)  # a threshold keeps all equal scores or none
    f1 = np.where(is_last_of_ties, 2 * num_true / (np.arange(1, len(scores) + 1) + num_objects), -1)
    place = int(f1.argmax())
    below = scores[place + 1] if place + 1 < len(scores) else 0.0
    middle = below + (scores[place] - below) / 2
    threshold = middle if middle < scores[place] else below
    return Best(
        float(threshold), float(f1[place]), float(num_true[place] / (place + 1)), float(num_true[place] / num_objects)
    )
