"""COCO average precision: an `evaluate` metric over pycocotools, and what `Trainer` calls."""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace

import datasets
import evaluate
import numpy as np
import torch
from datasets import List, Value
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from transformers import EvalPrediction

from ..data.rows import CocoData
from ..model.box_ops import xyxy_to_cxcywh
from ..model.targets import PADDING_LABEL

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
_TRUTH = {"boxes": np.float64, "labels": np.int64, "area": np.float64, "iscrowd": np.int64}
_DETECTIONS = {"boxes": np.float64, "scores": np.float64, "labels": np.int64}
_LABELS = ("image_id", "orig_size", "class_labels", "boxes")  # of those that DetectionCollator makes

COCO_LIMIT = 100  # detections of an image and class that COCO counts
TOP_K = 300  # detections that are kept of an image, all classes together

Columns = dict[str, np.ndarray]  # one row for each of many boxes: image_id, labels (category ids), boxes (N, 4), ...
ClassResult = tuple[np.ndarray, np.ndarray]  # precision (T, R, 1, A, M) and recall (T, 1, A, M) of pycocotools


class CocoDetectionMetric(evaluate.Metric):
    """The 12 numbers of COCO, and `AP_class_<name>` for each class of `class_names`: to the last bit what pycocotools gives for
    the boxes (x0, y0, x1 - x0, y1 - y0).

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
        known = _image_ids(references)
        if missing := [image_id for image_id in _image_ids(predictions) if image_id not in known]:
            raise ValueError(
                f"The prediction for image {missing[0]} has no reference; an image without objects needs one with empty lists."
            )
        truth = _columns(references, "reference", _TRUTH)
        detections = _columns(predictions, "prediction", _DETECTIONS)
        check_columns(truth, "reference", self.class_names)
        check_columns(detections, "prediction", self.class_names)
        limit = detection_limit(truth)
        return summarize(_evaluate(truth, detections, sorted(self.class_names), limit), self.class_names)


def _image_ids(images: list[dict]) -> set[int]:
    counts = Counter(image["image_id"] for image in images)
    if twice := [image_id for image_id, count in counts.items() if count > 1]:
        raise ValueError(f"Image {twice[0]} was added twice; every image must be evaluated once.")
    return set(counts)


def _columns(images: list[dict], kind: str, fields: dict[str, type]) -> Columns:
    for image in images:
        if len({len(image[name]) for name in fields}) > 1:
            raise ValueError(
                f"The {kind} for image {image['image_id']} has lists of different lengths: "
                f"{ {name: len(image[name]) for name in fields} }; each box needs one value in each."
            )
    counts = [len(image["labels"]) for image in images]
    columns = {"image_id": np.repeat(np.array([image["image_id"] for image in images], dtype=np.int64), counts)}
    for name, dtype in fields.items():
        values = np.array([value for image in images for value in image[name]], dtype=dtype)
        columns[name] = values.reshape(-1, 4) if name == "boxes" else values
    return columns


def check_columns(columns: Columns, kind: str, class_names: dict[int, str]) -> None:
    unknown = ~np.isin(columns["labels"], list(class_names))
    if unknown.any():
        image_id = columns["image_id"][unknown][0]
        labels = columns["labels"][unknown & (columns["image_id"] == image_id)]
        raise ValueError(
            f"The {kind} for image {image_id} has the labels {np.unique(labels).tolist()}, but class_names has "
            f"{sorted(class_names)}; labels are category ids, not class indices."
        )
    finite = np.isfinite(columns["boxes"]).all(axis=1)
    for name in ("scores", "area"):
        if name in columns:
            finite &= np.isfinite(columns[name])
    if not finite.all():
        raise ValueError(
            f"The {kind} for image {columns['image_id'][~finite][0]} has scores or boxes that are NaN or infinite, which cannot "
            "be ranked."
        )


def detection_limit(truth: Columns) -> int:
    """How many detections of an image and class are counted: COCO's 100, or as many as an image has objects of a class.

    With 100, the AP of a perfect detector on an image of 400 cells would be 0.25.
    """
    pairs = np.stack([truth["image_id"], truth["labels"]], axis=1)[truth["iscrowd"] == 0]
    return max([COCO_LIMIT, *np.unique(pairs, axis=0, return_counts=True)[1].tolist()])


def kept_of_image(limit: int) -> int:
    """How many detections of an image, all classes together, are kept for a limit of an image and class."""
    return TOP_K if limit == COCO_LIMIT else max(TOP_K, 3 * limit)


def _evaluate(
    truth: Columns, detections: Columns, category_ids: list[int], limit: int = COCO_LIMIT
) -> dict[int, ClassResult]:
    """One class after another: of all at once, pycocotools would hold gigabytes for 300 detections in each of 5,000 images."""
    results = {}
    for category_id in category_ids:
        evaluation = evaluate_class(of_class(truth, category_id), of_class(detections, category_id), limit).eval
        results[category_id] = evaluation["precision"], evaluation["recall"]
    return results


def of_class(columns: Columns, category_id: int) -> Columns:
    return {name: column[columns["labels"] == category_id] for name, column in columns.items()}


def evaluate_class(truth: Columns, detections: Columns, limit: int = COCO_LIMIT) -> COCOeval:
    """What pycocotools makes of the boxes of one class: its matches in `evalImgs`, its precision and recall in `eval`.

    Args:
        limit: of the detections of an image, at least 100. The last axis of `eval` is for 1, 10, 100 detections, and if it is
            higher, for this limit.
    """
    image_ids = np.union1d(truth["image_id"], detections["image_id"])
    corners = detections["boxes"].astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        true = _index(
            image_ids,
            image_id=truth["image_id"],
            bbox=truth["boxes"],
            area=truth["area"],
            iscrowd=truth["iscrowd"],
        )
        found = _index(
            image_ids,
            image_id=detections["image_id"],
            bbox=np.concatenate([corners[:, :2], sizes], axis=1),
            area=sizes.prod(axis=1),
            score=detections["scores"],
        )
        evaluation = COCOeval(true, found, iouType="bbox")
        if limit > COCO_LIMIT:
            evaluation.params.maxDets = [*evaluation.params.maxDets, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _index(image_ids: np.ndarray, **columns: np.ndarray) -> COCO:
    """The boxes of one class, which has the id 1 here, in the form of pycocotools, whose names the columns have."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in image_ids.tolist()],
        "categories": [{"id": 1}],
        # the ids begin at 1, for pycocotools takes a match with 0 for none
        "annotations": [
            {"id": number, "category_id": 1, **dict(zip(columns, row, strict=True))}
            for number, row in enumerate(rows, start=1)
        ],
    }
    coco.createIndex()
    return coco


def _evaluate_together(
    truth: Columns, detections: Columns, category_ids: list[int], limit: int = COCO_LIMIT
) -> dict[int, ClassResult]:
    """`_evaluate`, the classes shared out over the processes of a distributed run, each of which gets the results of all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return _evaluate(truth, detections, category_ids, limit)
    parts = [None] * torch.distributed.get_world_size()
    own = category_ids[torch.distributed.get_rank() :: len(parts)]
    torch.distributed.all_gather_object(parts, _evaluate(truth, detections, own, limit))
    return {category_id: result for part in parts for category_id, result in part.items()}


def summarize(results: dict[int, ClassResult], class_names: dict[int, str]) -> dict[str, float]:
    """The 12 numbers of COCO and `AP_class_<name>` of each class; -1 where there is no ground truth."""
    category_ids = sorted(results)
    precision = np.concatenate([results[category_id][0] for category_id in category_ids], axis=2)
    recall = np.concatenate([results[category_id][1] for category_id in category_ids], axis=1)
    scores = dict(zip(NAMES, _twelve_numbers(precision, recall), strict=True))
    for index, category_id in enumerate(category_ids):
        values = precision[:, :, index, 0, -1]  # (T, R) for all areas, as many detections as count
        values = values[values > -1]
        scores[f"AP_class_{class_names[category_id]}"] = float(values.mean()) if values.size else -1.0
    return scores


def _twelve_numbers(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    """
    Args:
        precision, recall: (T, R, K, A, M) and (T, K, A, M).
    """
    if precision.shape[-1] == 3:
        evaluation = COCOeval(iouType="bbox")
        evaluation.eval = {"precision": precision, "recall": recall}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        return list(map(float, evaluation.stats))
    # pycocotools looks for the AP of 100 detections, whatever its limits are.
    areas = range(1, precision.shape[3])
    values = [precision[..., 0, -1], precision[0, ..., 0, -1], precision[5, ..., 0, -1]]
    values += [precision[..., area, -1] for area in areas]
    values += [recall[..., 0, index] for index in range(3)]
    values += [recall[..., area, -1] for area in areas]
    return [float(known.mean()) if (known := value[value > -1]).size else -1.0 for value in values]


class CocoEvaluator:
    """`compute_metrics` of `Trainer`: what `CocoDetectionMetric` gives for the predictions on `data`, crowd regions and areas as
    annotated, the same in each process of a distributed run.

        evaluator = CocoEvaluator(held_out, image_processor)
        Trainer(..., compute_metrics=evaluator, preprocess_logits_for_metrics=evaluator.keep_top)

    with `batch_eval_metrics=True`, so that of each image only its best 300 detections are kept, and `DetectionCollator`. Without
    one of the two, the numbers are the same, but `Trainer` gathers all logits, or joins the batches of the whole evaluation.

    In a distributed run every process must call it, as `Trainer` does. An image that the sampler repeats to fill up the last
    batch counts once.

    Each data set needs an evaluator of its own: a dictionary of `eval_dataset`s, for which `Trainer` has but one
    `compute_metrics`, is evaluated by setting `trainer.compute_metrics` before each `trainer.evaluate(one_of_them)`.

    Args:
        data: the evaluation data; detections are scored under their original category ids.
        image_processor: its `top_detections` makes the detections.
    """

    def __init__(self, data: CocoData, image_processor):
        self.category_ids = np.array(data.category_ids)
        self.class_names = {category_id: data.id2label[index] for index, category_id in enumerate(data.category_ids)}
        self.image_processor = image_processor
        # image id -> scores, labels, boxes of the evaluation that is under way
        self.detections: dict[int, dict[str, np.ndarray]] = {}
        rows = data.dataset.select_columns(["image_id", "width", "height", "objects"])
        self.rows = {row["image_id"]: row for row in rows}
        pairs = Counter(
            (row["image_id"], category)
            for row in rows
            for category, is_crowd in zip(row["objects"]["category"], row["objects"]["iscrowd"], strict=True)
            if not is_crowd
        )
        self.top_k = kept_of_image(max([COCO_LIMIT, *pairs.values()]))

    def keep_top(self, predictions: tuple, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """`preprocess_logits_for_metrics` of `Trainer`: the best 300 detections of each image, on the device of the predictions.

        Args:
            predictions: loss_dict, logits (B, Q, K) and boxes (B, Q, 4) cxcywh in [0, 1], as `Trainer` has them.
            labels: of `DetectionCollator`.
        Returns:
            `scores` (B, N) float32 in [0, 1], highest first, `labels` (B, N) int32 in [0, K), `boxes` (B, N, 4) float32
            as (x0, y0, x1, y1) in pixels of the original image; N is 300, or Q * K if that is less, or more where an image has more
            than 100 objects of a class. Where a label is -100 there
            is no detection, for small images have fewer queries. `Trainer.predict` returns them too, as arrays.
        Raises:
            ValueError: the labels are not of `DetectionCollator`.
        """
        _check_form(labels)
        _, logits, boxes = predictions[:3]
        detections = self.image_processor.top_detections(
            SimpleNamespace(logits=torch.as_tensor(logits), pred_boxes=torch.as_tensor(boxes)),
            labels["orig_size"],
            top_k=self.top_k,
        )
        x0, _, x1, _ = detections["boxes"].unbind(-1)
        # `Trainer` fills up the queries of images, and later the detections, with -100. Such a box has a negative size.
        return detections | {"labels": detections["labels"].int().masked_fill(x1 < x0, PADDING_LABEL)}

    def __call__(self, evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        labels, predictions = evaluation.label_ids, evaluation.predictions
        _check_form(labels)
        labels = {name: torch.as_tensor(labels[name]).cpu() for name in _LABELS}
        image_ids = labels["image_id"].tolist()
        try:
            self._check_images(image_ids, labels)
            num_new = self._count_new(image_ids, is_last=compute_result)
        except ValueError:
            self.detections.clear()
            raise
        detections = predictions if isinstance(predictions, Mapping) else self.keep_top(predictions, labels)
        detections = {name: torch.as_tensor(values).cpu().numpy() for name, values in detections.items()}
        for index, image_id in enumerate(image_ids[:num_new]):
            kept = detections["labels"][index] != PADDING_LABEL
            self.detections[image_id] = {name: values[index][kept] for name, values in detections.items()}
        return self._compute() if compute_result else {}

    def _count_new(self, image_ids: list[int], is_last: bool) -> int:
        """How many images of a batch come for the first time; others may follow them where a sampler fills up the last batch."""
        new = [image_id for image_id in dict.fromkeys(image_ids) if image_id not in self.detections]
        fills_up = is_last and new and new == image_ids[: len(new)]
        if len(new) < len(image_ids) and not fills_up:
            counts = Counter([*self.detections, *image_ids])
            twice = sorted(image_id for image_id, count in counts.items() if count > 1)
            raise ValueError(
                f"The images {twice[:5]} were evaluated before: an earlier evaluation was broken off, and what it left has been "
                "dropped now, so evaluate again; or the data are sampled with repetition, which COCO AP cannot be."
            )
        return len(new)

    def _compute(self) -> dict[str, float]:
        found, self.detections = self.detections, {}
        scores, labels, boxes = (
            np.concatenate([image[name] for image in found.values()]) for name in ("scores", "labels", "boxes")
        )
        detections = {
            "image_id": np.repeat(list(found), [len(image["scores"]) for image in found.values()]),
            "boxes": boxes,
            "scores": scores,
            "labels": self.category_ids[labels],
        }
        check_columns(detections, "prediction", self.class_names)
        truth = _columns([self._reference(image_id) for image_id in found], "reference", _TRUTH)
        results = _evaluate_together(truth, detections, sorted(self.class_names), detection_limit(truth))
        return summarize(results, self.class_names)

    def _reference(self, image_id: int) -> dict:
        objects = self.rows[image_id]["objects"]
        labels = [int(self.category_ids[index]) for index in objects["category"]]
        return {
            "image_id": image_id,
            "boxes": objects["bbox"],
            "labels": labels,
            "area": objects["area"],
            "iscrowd": objects["iscrowd"],
        }

    def _check_images(self, image_ids: list[int], labels: dict[str, Tensor]) -> None:
        """Two data sets may number their images alike: that these are ours is seen from sizes and annotations."""
        if unknown := sorted(set(image_ids) - set(self.rows)):
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


def _check_form(labels) -> None:
    if not isinstance(labels, Mapping) or not set(_LABELS) <= set(labels):
        found = f"a {type(labels).__name__}" + (f" of {sorted(labels)}" if isinstance(labels, Mapping) else "")
        raise ValueError(
            f"The labels of the evaluation are {found}, but must be a dictionary of {sorted(_LABELS)}: pass DetectionCollator "
            "to Trainer as data_collator, and leave eval_do_concat_batches=True."
        )


def _labels_of(objects: dict[str, list], height: int, width: int) -> tuple[list[int], Tensor]:
    """Class indices and boxes, (T, 4) cxcywh in [0, 1], that image processors make of the objects of an image."""
    kept = [index for index, iscrowd in enumerate(objects["iscrowd"]) if not iscrowd]
    boxes = torch.tensor([objects["bbox"][index] for index in kept]).reshape(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) / torch.tensor([width, height] * 2)
    return [objects["category"][index] for index in kept], xyxy_to_cxcywh(corners.clamp(0, 1))
