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


def by_pycocotools(annotation_file: Path, detections, image_ids: list[int] | None = None) -> dict[str, float]:
    """The 12 numbers and `AP_class_<name>`.

    Args:
        detections: (image id, (x0, y0, x1, y1) in pixels, category id, score) of each.
        image_ids: the images to evaluate, all by default.
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
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = dict(zip(NAMES, evaluation.stats.tolist(), strict=True))
    for index, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, index, 0, -1]
        precision = precision[precision > -1]
        name = truth.loadCats([int(category_id)])[0]["name"]
        scores[f"AP_class_{name}"] = precision.mean().item() if precision.size else -1.0
    return scores
