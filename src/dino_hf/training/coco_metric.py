"""COCO average precision: an `evaluate` metric over pycocotools, and what `Trainer` calls."""

import contextlib
import io
from types import SimpleNamespace

import datasets
import evaluate
import torch
from datasets import List, Value
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import EvalPrediction

from .coco_data import CocoData

# COCOeval's twelve numbers, in its order.
NAMES = (
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
)

_DESCRIPTION = "COCO box AP and AR, computed by pycocotools, and the AP of each class."
_INPUTS = """
    predictions: for each image {"image_id", "boxes" (N, 4) as (x0, y0, x1, y1) in pixels, "scores" (N,), "labels" (N,)}.
    references: for each image {"image_id", "boxes" (T, 4) as (x, y, width, height) in pixels, "labels" (T,), "area" (T,),
        "iscrowd" (T,)}. Labels are category ids of any kind, the same on both sides.
"""


class CocoDetectionMetric(evaluate.Metric):
    """The 12 numbers of COCO, and `AP_class_<name>` for each class of `class_names`.

    A number without any ground truth is -1, as pycocotools has it.

    Args:
        class_names: category id -> name.
    """

    def __init__(self, class_names: dict[int, str], **kwargs):
        super().__init__(**kwargs)
        self.class_names = class_names

    def _info(self) -> evaluate.MetricInfo:
        boxes = List(List(Value("float64"), length=4))
        numbers, integers = List(Value("float64")), List(Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"image_id": Value("int64"), "boxes": boxes, "scores": numbers, "labels": integers},
                    "references": {
                        "image_id": Value("int64"),
                        "boxes": boxes,
                        "labels": integers,
                        "area": numbers,
                        "iscrowd": integers,
                    },
                }
            ),
        )

    def _compute(self, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        image_ids = [reference["image_id"] for reference in references]
        if len(set(image_ids)) != len(image_ids):
            twice = next(image_id for image_id in image_ids if image_ids.count(image_id) > 1)
            raise ValueError(f"Image {twice} was added twice; every image must be evaluated once.")
        truth = [
            {"image_id": image["image_id"], "bbox": box, "category_id": label, "area": area, "iscrowd": iscrowd}
            for image in references
            for box, label, area, iscrowd in zip(
                image["boxes"], image["labels"], image["area"], image["iscrowd"], strict=True
            )
        ]
        found = [
            {
                "image_id": image["image_id"],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "category_id": label,
                "score": score,
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for image in predictions
            for (x0, y0, x1, y1), label, score in zip(image["boxes"], image["labels"], image["scores"], strict=True)
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            evaluation = COCOeval(self._index(truth, image_ids), self._index(found, image_ids), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        scores = dict(zip(NAMES, map(float, evaluation.stats), strict=True))
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) for all areas, 100 detections
        for index, category_id in enumerate(evaluation.params.catIds):
            values = precision[:, :, index]
            values = values[values > -1]
            scores[f"AP_class_{self.class_names[category_id]}"] = float(values.mean()) if values.size else -1.0
        return scores

    def _index(self, annotations: list[dict], image_ids: list[int]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in image_ids],
            "categories": [{"id": category_id, "name": name} for category_id, name in self.class_names.items()],
            "annotations": [{**entry, "id": index + 1} for index, entry in enumerate(annotations)],
        }
        coco.createIndex()
        return coco


class CocoEvaluator:
    """`compute_metrics` of `Trainer`: COCO AP of the predictions on `data`, crowd regions and areas as annotated.

    Works with `batch_eval_metrics=True`, which keeps memory flat, and without. Batches must come from `DetectionCollator`.

    Args:
        data: the evaluation data; detections are scored under their original category ids.
        image_processor: its `post_process_object_detection` makes the detections.
    """

    def __init__(self, data: CocoData, image_processor):
        self.category_ids = torch.tensor(data.category_ids)
        self.image_processor = image_processor
        names = {category_id: data.id2label[index] for index, category_id in enumerate(data.category_ids)}
        self.metric = CocoDetectionMetric(names)
        self.predictions: dict[int, dict] = {}  # image id -> detections of the evaluation that is under way
        rows = data.dataset.select_columns(["image_id", "objects"])
        self.references = {
            row["image_id"]: {
                "image_id": row["image_id"],
                "boxes": row["objects"]["bbox"],
                "labels": [data.category_ids[index] for index in row["objects"]["category"]],
                "area": row["objects"]["area"],
                "iscrowd": row["objects"]["iscrowd"],
            }
            for row in rows
        }

    def __call__(self, evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        logits, boxes = evaluation.predictions[1:3]  # after loss_dict
        labels = evaluation.label_ids
        image_ids = torch.as_tensor(labels["image_id"]).tolist()
        if unknown := sorted(set(image_ids) - set(self.references)):
            raise ValueError(f"The images {unknown[:5]} are not in the data that this CocoEvaluator was made for.")
        if twice := sorted(image_id for image_id in image_ids if image_id in self.predictions):
            self.predictions.clear()
            raise ValueError(
                f"The images {twice[:5]} were evaluated before: an earlier evaluation was broken off, and what it left has been "
                "dropped now, so evaluate again; or the data are sampled with repetition, which COCO AP cannot be."
            )
        detections = self.image_processor.post_process_object_detection(
            SimpleNamespace(logits=torch.as_tensor(logits), pred_boxes=torch.as_tensor(boxes)),
            threshold=-1.0,  # AP wants the whole ranking
            target_sizes=torch.as_tensor(labels["orig_size"]),
        )
        for image_id, detection in zip(image_ids, detections, strict=True):
            self.predictions[image_id] = {
                "image_id": image_id,
                "boxes": detection["boxes"].tolist(),
                "scores": detection["scores"].tolist(),
                "labels": self.category_ids[detection["labels"].cpu()].tolist(),
            }
        if not compute_result:
            return {}
        predictions, self.predictions = self.predictions, {}
        references = [self.references[image_id] for image_id in predictions]
        return self.metric.compute(predictions=list(predictions.values()), references=references)
