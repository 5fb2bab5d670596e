"""COCO average precision: an `evaluate` metric over pycocotools, and what `Trainer` calls."""

import contextlib
import io
import math
from collections.abc import Mapping
from types import SimpleNamespace

import datasets
import evaluate
import torch
from datasets import List, Value
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import EvalPrediction

from ..box_ops import xyxy_to_cxcywh
from ..targets import PADDING_LABEL
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
        self._check(predictions, "prediction", set(image_ids))
        self._check(references, "reference", set(image_ids))
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

    def _check(self, images: list[dict], kind: str, image_ids: set[int]) -> None:
        for image in images:
            where = f"The {kind} for image {image['image_id']}"
            if image["image_id"] not in image_ids:
                raise ValueError(f"{where} has no reference; an image without objects needs one with empty lists.")
            if unknown := set(image["labels"]) - set(self.class_names):
                raise ValueError(
                    f"{where} has the labels {sorted(unknown)}, but class_names has {sorted(self.class_names)}; labels are "
                    "category ids, not class indices."
                )
            numbers = [*image.get("scores", []), *(value for box in image["boxes"] for value in box)]
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"{where} has scores or boxes that are NaN or infinite, which cannot be ranked.")

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

    Each data set needs an evaluator of its own: a dictionary of `eval_dataset`s, for which `Trainer` has but one
    `compute_metrics`, is evaluated by setting `trainer.compute_metrics` before each `trainer.evaluate(one_of_them)`.

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
        rows = data.dataset.select_columns(["image_id", "width", "height", "objects"])
        self.rows = {row["image_id"]: row for row in rows}
        self.references = {
            image_id: {
                "image_id": image_id,
                "boxes": row["objects"]["bbox"],
                "labels": [data.category_ids[index] for index in row["objects"]["category"]],
                "area": row["objects"]["area"],
                "iscrowd": row["objects"]["iscrowd"],
            }
            for image_id, row in self.rows.items()
        }

    def __call__(self, evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        labels, names = evaluation.label_ids, ("image_id", "orig_size", "class_labels", "boxes")
        if not isinstance(labels, Mapping) or not set(names) <= set(labels):
            found = f"a {type(labels).__name__}" + (f" of {sorted(labels)}" if isinstance(labels, Mapping) else "")
            raise ValueError(
                f"The labels of the evaluation are {found}, but must be a dictionary of {sorted(names)}: pass DetectionCollator "
                "to Trainer as data_collator, and leave eval_do_concat_batches=True."
            )
        labels = {name: torch.as_tensor(labels[name]).cpu() for name in names}
        logits, boxes = evaluation.predictions[1:3]  # after loss_dict
        image_ids = labels["image_id"].tolist()
        try:
            self._check_images(image_ids, labels)
        except ValueError:
            self.predictions.clear()
            raise
        if twice := sorted(image_id for image_id in image_ids if image_id in self.predictions):
            self.predictions.clear()
            raise ValueError(
                f"The images {twice[:5]} were evaluated before: an earlier evaluation was broken off, and what it left has been "
                "dropped now, so evaluate again; or the data are sampled with repetition, which COCO AP cannot be."
            )
        detections = self.image_processor.post_process_object_detection(
            SimpleNamespace(logits=torch.as_tensor(logits), pred_boxes=torch.as_tensor(boxes)),
            threshold=-1.0,  # AP wants the whole ranking
            target_sizes=labels["orig_size"],
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

    def _check_images(self, image_ids: list[int], labels: dict[str, torch.Tensor]) -> None:
        """Two data sets may number their images alike: that these are ours is seen from sizes and annotations."""
        if unknown := sorted(set(image_ids) - set(self.references)):
            raise ValueError(
                f"The images {unknown[:5]} are not in the data that this CocoEvaluator was made for; each data set needs an "
                "evaluator of its own."
            )
        for image_id, size, classes, boxes in zip(
            image_ids, labels["orig_size"].tolist(), labels["class_labels"], labels["boxes"], strict=True
        ):
            row, kept = self.rows[image_id], classes != PADDING_LABEL
            found, found_boxes = (size, classes[kept].tolist()), boxes[kept].float()
            wanted_size = size if row["height"] is None else [row["height"], row["width"]]
            wanted_classes, wanted_boxes = _labels_of(row["objects"], *size)
            # A hundredth: boxes may have come in half precision.
            if found != (wanted_size, wanted_classes) or (found_boxes - wanted_boxes).abs().gt(0.01).any():
                raise ValueError(
                    f"Image {image_id} is evaluated with (height, width) {size} and the classes {found[1]}, but the image of that "
                    f"id in the data of this CocoEvaluator has {wanted_size}, {wanted_classes} or other boxes; each data set "
                    "needs an evaluator of its own."
                )


def _labels_of(objects: dict[str, list], height: int, width: int) -> tuple[list[int], torch.Tensor]:
    """Class indices and boxes, (T, 4) cxcywh in [0, 1], that image processors make of the objects of an image."""
    kept = [index for index, iscrowd in enumerate(objects["iscrowd"]) if not iscrowd]
    boxes = torch.tensor([objects["bbox"][index] for index in kept]).reshape(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) / torch.tensor([width, height] * 2)
    return [objects["category"][index] for index in kept], xyxy_to_cxcywh(corners.clamp(0, 1))
