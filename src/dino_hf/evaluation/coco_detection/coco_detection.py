"""COCO box AP and AR as a metric of the library `evaluate`."""

import datasets
import evaluate
from datasets import List, Value

# Not a relative import: `evaluate.load` runs a copy of this file outside of the package.
from dino_hf.evaluation.coco import coco_scores

_INPUTS = """
    predictions: per image {"image_id", "boxes" (N, 4) as (x0, y0, x1, y1) in pixels, "scores" (N,), "labels" (N,)}.
    references: per image {"image_id", "boxes" (T, 4) as (x, y, width, height) in pixels, "labels" (T,), "area" (T,),
        "iscrowd" (T,)}. Labels are category ids: any integers, the same on both sides.
"""


class CocoDetectionMetric(evaluate.Metric):
    """The 12 COCO numbers, and `AP_class_<name>` for each class. They equal the numbers of pycocotools bit by bit.

        metric = evaluate.load(dino_hf.evaluation.COCO_METRIC, class_names={1: "cat", 2: "dog"})
        metric.add_batch(predictions=predictions, references=references)
        print(metric.compute()["AP"])

    Numbers are in [0, 1]. A number without any ground truth is -1, as in pycocotools.

    Args:
        class_names: category id -> name. None: the category ids of the boxes, which are their own names.
    """

    def __init__(self, class_names: dict[int, str] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.class_names = class_names

    def _info(self) -> evaluate.MetricInfo:
        boxes = List(List(Value("float64"), length=4))
        numbers, integers = List(Value("float64")), List(Value("int64"))
        predictions = {"image_id": Value("int64"), "boxes": boxes, "scores": numbers, "labels": integers}
        references = {"image_id": Value("int64"), "boxes": boxes, "labels": integers, "area": numbers}
        references["iscrowd"] = integers
        return evaluate.MetricInfo(
            description="COCO box AP and AR, computed by pycocotools, and the AP of each class.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def _compute(self, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        class_names = self.class_names
        if class_names is None:
            ids = {label for image in (*predictions, *references) for label in image["labels"]}
            if not ids:
                raise ValueError("No image has a box, so the classes are unknown; give class_names.")
            class_names = {category_id: str(category_id) for category_id in sorted(ids)}
        return coco_scores(predictions, references, class_names)
