"""COCO's numbers from pycocotools as its own demo uses it: an annotation file, a list of results, one evaluation of everything."""

import contextlib
import io
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# pycocotools' `stats`, in its order
NAMES = [
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
]


def by_pycocotools(
    annotation_file: Path, detections, image_ids: list[int] | None = None, limit: int = 100
) -> dict[str, float]:
    """The 12 numbers and `AP_class_<name>`, with a limit above 100 also `AR_<limit>`.

    Args:
        detections: (image id, (x0, y0, x1, y1) in pixels, category id, score) of each.
        image_ids: the images to evaluate, all by default.
        limit: the last of `maxDets`, of which AP is.
    """
    results = [
        {"image_id": image_id, "category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for image_id, (x0, y0, x1, y1), category_id, score in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotation_file)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        if limit > 100:
            evaluation.params.maxDets = [1, 10, 100, limit]
        evaluation.evaluate()
        evaluation.accumulate()
        if limit == 100:
            evaluation.summarize()
            scores = dict(zip(NAMES, evaluation.stats.tolist(), strict=True))
        else:  # `summarize` looks for the AP of 100 detections
            scores = _twelve_numbers(evaluation.eval["precision"], evaluation.eval["recall"], limit)
    for index, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, index, 0, -1]
        precision = precision[precision > -1]
        name = truth.loadCats([int(category_id)])[0]["name"]
        scores[f"AP_class_{name}"] = precision.mean().item() if precision.size else -1.0
    return scores


def _twelve_numbers(precision, recall, limit: int) -> dict[str, float]:
    """The numbers by their place in pycocotools' arrays: precision (IoU, recall, class, area, limit), recall without its axis."""

    def mean(values):
        values = values[values > -1]
        return values.mean().item() if values.size else -1.0

    sizes = {"small": 1, "medium": 2, "large": 3}
    scores = {"AP": mean(precision[:, :, :, 0, 3])}
    scores |= {"AP50": mean(precision[0, :, :, 0, 3]), "AP75": mean(precision[5, :, :, 0, 3])}
    scores |= {f"AP_{size}": mean(precision[:, :, :, area, 3]) for size, area in sizes.items()}
    scores |= {f"AR_{count}": mean(recall[:, :, 0, index]) for index, count in enumerate((1, 10, 100))}
    scores |= {f"AR_{size}": mean(recall[:, :, area, 3]) for size, area in sizes.items()}
    return scores | {f"AR_{limit}": mean(recall[:, :, 0, 3])}
