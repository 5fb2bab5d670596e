"""The result of an evaluation: its numbers, and everything needed to draw and compare them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.tiles import Tiling
from ..inference.score_thresholds import DEFAULT_THRESHOLD
from .bootstrap import STATISTICS
from .coco import Columns
from .curves import Best, Curves
from .matching import AREA_RANGES, SIZES
from .mistakes import Mistake

_MOST_ROWS = 101  # a larger confusion matrix is written to json as a list of cells


@dataclass(eq=False, repr=False)
class Evaluation:
    """The scores of a detector on a data set. Numbers are in [0, 1]. A number without ground truth is -1, as in pycocotools."""

    model: str
    data_name: str | None
    class_names: dict[int, str]  # category id -> name, in the order of the class indices
    model_classes: dict[str, int]  # name of a class in the model -> category id of its class in the data
    metrics: dict[str, float]  # the 12 COCO numbers, and AP_class_<name>
    # 95 % intervals of AP, AP50, AP75, AP by size and AP_class_<name>, if at least two images have objects; {} without resamples
    intervals: dict[str, tuple[float, float]]
    per_class: list[dict[str, Any]]  # a row for each class
    curves: Curves
    confusion: np.ndarray  # (K + 1, K + 1) from `confusion_matrix` at `threshold`
    mistakes: list[Mistake]
    truth: Columns  # image_id, labels (category ids), boxes (x, y, w, h), area, iscrowd
    found: Columns  # image_id, labels (category ids), boxes (x0, y0, x1, y1), scores
    image_ids: np.ndarray  # (I,) ascending
    samples: np.ndarray  # (B, K, 6) from `resample`
    seed: int  # seed of the resamples
    left_out: dict[str, int]  # class of the model that the data do not have -> number of its detections
    notes: list[str]  # sentences for the user
    max_detections: int = 100  # number of detections that count per image and class
    tiling: Tiling | None = None  # tiles that larger images were cut into; None: whole images only
    # AP of old classes, from the run that trained the detector with `keep_classes`; None: it kept none
    old_classes: dict[str, Any] | None = None

    def __repr__(self) -> str:
        counts = self.counts
        return (
            f"Evaluation({self.model!r:.100} on {counts['images']} images, {counts['objects']} objects, {len(self.class_names)} "
            f"classes: AP {self.metrics['AP']:.3f}, AP50 {self.metrics['AP50']:.3f})"
        )

    @property
    def best(self) -> Best | None:
        """The score threshold with the highest F1 over all classes. None if no object was found."""
        return self.curves.best

    @property
    def best_threshold(self) -> float | None:
        return None if self.best is None else self.best.threshold

    @property
    def threshold(self) -> float:
        """The score threshold of the confusion matrix and of the mistakes: the best one, or 0.5 if there is none."""
        return DEFAULT_THRESHOLD if self.best is None else self.best.threshold

    @property
    def counts(self) -> dict[str, int]:
        is_crowd = self.truth["iscrowd"].astype(bool)
        area = self.truth["area"][~is_crowd]
        # ranges of pycocotools: a border value belongs to both sides
        ranges = zip(SIZES[1:], AREA_RANGES[1:], strict=True)
        return {
            "images": len(self.image_ids),
            "objects": len(area),
            **{f"objects_{size}": int(((area >= low) & (area <= high)).sum()) for size, (low, high) in ranges},
            "crowds": int(is_crowd.sum()),
            "detections": len(self.found["labels"]),
            "detections_left_out": sum(self.left_out.values()),
        }

    @property
    def detections(self) -> list[dict]:
        """COCO's list of results, with the image ids and category ids of the data. Boxes are [x, y, width, height] in pixels.

        pycocotools reads it and gives the same numbers. The list is created at each access.
        """
        corners = self.found["boxes"]
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        columns = (self.found["image_id"], self.found["labels"], boxes, self.found["scores"])
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for image_id, category_id, box, score in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """All results for json. A number without ground truth is None."""
        names = list(self.class_names.values())
        return {
            "model": self.model,
            "dataset": self.data_name,
            "counts": self.counts,
            "metrics": {name: _none_for_absent(value) for name, value in self.metrics.items()},
            "intervals_95": {name: list(bounds) for name, bounds in self.intervals.items()},
            "best_threshold": None if self.best is None else self.best._asdict(),
            "per_class": [
                {name: _none_for_absent(value) if name in _ROW_NUMBERS else value for name, value in row.items()}
                for row in self.per_class
            ],
            "max_detections": self.max_detections,
            "tiles": None if self.tiling is None else self.tiling.as_dict(),
            "confusion": {
                "iou": 0.5,
                "threshold": self.threshold,
                "rows": [*names, "background"],
                "columns": [*names, "missed"],
                **_confusion(self.confusion),
            },
            "bootstrap": {"resamples": len(self.samples), "seed": self.seed},
            "left_out": self.left_out,
            "notes": self.notes,
            **({} if self.old_classes is None else {"old_classes": self.old_classes}),
        }


_ROW_NUMBERS = {*STATISTICS, "AR_100"}


def _none_for_absent(value: float) -> float | None:
    return None if value == -1 else value


def _confusion(counts: np.ndarray) -> dict[str, list]:
    """All counts. For more than 100 classes, only (row, column, count) of the nonzero ones: 1,000 classes have a million."""
    if len(counts) <= _MOST_ROWS:
        return {"counts": counts.tolist()}
    places = np.argwhere(counts)
    return {"cells": [[*place, int(counts[tuple(place)])] for place in places.tolist()]}
