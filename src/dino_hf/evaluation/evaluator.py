"""`compute_metrics` for `Trainer`: COCO's numbers on one data set."""

from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..data.rows import CocoData
from ..data.tiled_data import id_name, whole_images
from ..model.box_ops import xyxy_to_cxcywh
from ..model.nms import with_candidates
from ..model.targets import PADDING_LABEL
from .coco import (
    TRUTH_TYPES,
    ClassResult,
    Columns,
    check_columns,
    detection_limit,
    evaluate_classes,
    join_images,
    num_kept,
    summarize,
)
from .tile_merging import TileMerging

_LABELS = ("image_id", "orig_size", "class_labels", "boxes")  # the fields of DetectionCollator that are needed here


class CocoEvaluator:
    """`compute_metrics` for `Trainer`: the 12 COCO numbers and the AP of each class, on one data set.

        evaluator = CocoEvaluator(held_out, image_processor)
        Trainer(..., compute_metrics=evaluator, preprocess_logits_for_metrics=evaluator.keep_top)

    Use it with `DetectionCollator` and `batch_eval_metrics=True`. Then only the best 300 detections of each image are kept.
    Without `keep_top` or `batch_eval_metrics` the numbers are the same, but `Trainer` holds the logits of all images, or joins
    the batches of the whole evaluation. Crowd regions and areas are taken from the annotations.

    In a distributed run, every process must call the evaluator, as `Trainer` does, and every process gets the same numbers.
    An image that the sampler repeats to fill the last batch counts once.

    Each data set needs its own evaluator, but `Trainer` has one `compute_metrics` even for a dictionary of `eval_dataset`s.
    For several data sets, set `trainer.compute_metrics` before each `trainer.evaluate(one_of_them)`.

    For tiles (`cut_into_tiles`), the detections of all tiles of an image are merged as in `predict(..., tiles=...)`, and AP is
    measured on whole images.

    Args:
        data: the evaluation data, or tiles of them. Detections are scored under their original category ids.
        image_processor: a `DinoDetrImageProcessor`. Its `top_detections` turns predictions into detections and applies its
            non-maximum suppression. If more than 300 detections are kept, the suppression gets more candidates.
        max_detections: number of detections that count per image and class, at least 100. Then 3 times as many are kept of each
            image, over all classes. None: 100 as in COCO, or the most objects of a class in an image.
    """

    def __init__(self, data: CocoData, image_processor, max_detections: int | None = None):
        self.category_ids = np.array(data.category_ids)
        self.class_names = {category_id: data.id2label[index] for index, category_id in enumerate(data.category_ids)}
        self.image_processor = image_processor
        self.data = data
        # image id -> scores, labels and boxes found so far in the current evaluation; of a tile, only its id
        self.detections: dict[int, dict[str, np.ndarray]] = {}
        self.rows = _rows(data)
        whole = whole_images(data)
        self._whole_rows = self.rows if whole is data else _rows(whole)
        self.max_detections = max_detections
        truth = join_images([self._reference(image_id) for image_id in self._whole_rows], "reference", TRUTH_TYPES)
        self.top_k = num_kept(detection_limit(truth, max_detections))
        self._merging = None if whole is data else TileMerging(data, self.top_k)

    def keep_top(self, predictions: tuple, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """`preprocess_logits_for_metrics` for `Trainer`: keep the best 300 detections of each image.

        They stay on the device of the predictions. `Trainer.predict` returns them too, as arrays.

        Args:
            predictions: loss_dict, logits (B, Q, K) and boxes (B, Q, 4) cxcywh in [0, 1], in the order of `Trainer`.
            labels: labels from `DetectionCollator`.
        Returns:
            `scores` (B, N) float32 in [0, 1], highest first; `labels` (B, N) int32 in [0, K), or -100 for padding, because
            small images have fewer queries; `boxes` (B, N, 4) float32 as (x0, y0, x1, y1) in pixels of the original image.
            N is 300, but at most Q * K. It is larger if more than 100 detections count per image and class.
        Raises:
            ValueError: the labels do not come from `DetectionCollator`.
        """
        _check_labels(labels)
        _, logits, boxes = predictions[:3]
        nms = with_candidates(self.image_processor.nms, self.top_k, logits.shape[1])
        detections = self.image_processor.top_detections(
            SimpleNamespace(logits=torch.as_tensor(logits), pred_boxes=torch.as_tensor(boxes)),
            labels["orig_size"],
            top_k=self.top_k,
            nms=nms,
        )
        del detections["queries"]
        x0, _, x1, _ = detections["boxes"].unbind(-1)
        # `Trainer` pads queries, and later detections, with -100. A padded box has a negative width.
        return detections | {"labels": detections["labels"].int().masked_fill(x1 < x0, PADDING_LABEL)}

    def __call__(self, evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch, or a whole evaluation. With `compute_result`, return the numbers and forget the detections.

        Raises:
            ValueError: the images or labels are not from the data of this evaluator, or an image is repeated.
        """
        labels, predictions = evaluation.label_ids, evaluation.predictions
        _check_labels(labels)
        labels = {name: torch.as_tensor(labels[name]).cpu() for name in _LABELS}
        image_ids = labels["image_id"].tolist()
        try:
            self._check_images(image_ids, labels)
            num_new = self._count_new(image_ids, is_last=compute_result)
        except ValueError:
            self._forget()
            raise
        detections = predictions if isinstance(predictions, Mapping) else self.keep_top(predictions, labels)
        detections = {name: torch.as_tensor(values).cpu().numpy() for name, values in detections.items()}
        for index, image_id in enumerate(image_ids[:num_new]):
            kept = detections["labels"][index] != PADDING_LABEL
            found = {name: values[index][kept] for name, values in detections.items()}
            if self._merging is not None:
                self._merging.add(image_id, found)
            self.detections[image_id] = found if self._merging is None else {}
        return self._compute() if compute_result else {}

    def _count_new(self, image_ids: list[int], is_last: bool) -> int:
        """The number of new images in a batch. Repeated images may follow them only where a sampler fills the last batch."""
        new = [image_id for image_id in dict.fromkeys(image_ids) if image_id not in self.detections]
        is_filled_up = is_last and new and new == image_ids[: len(new)]
        if len(new) < len(image_ids) and not is_filled_up:
            counts = Counter([*self.detections, *image_ids])
            twice = sorted(image_id for image_id, count in counts.items() if count > 1)
            raise ValueError(
                f"The images {twice[:5]} were evaluated before. Either an earlier evaluation was interrupted: its detections "
                "are dropped now, so evaluate again. Or the data are sampled with repetition, which COCO AP does not allow."
            )
        return len(new)

    def _forget(self) -> None:
        """Drop the detections of this evaluation."""
        self.detections = {}
        if self._merging is not None:
            self._merging.restart()

    def _compute(self) -> dict[str, float]:
        found = self.detections if self._merging is None else dict(self._merging.take())
        self._forget()
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
        truth = join_images([self._reference(image_id) for image_id in found], "reference", TRUTH_TYPES)
        limit = detection_limit(truth, self.max_detections)
        results = _evaluate_in_parts(truth, detections, sorted(self.class_names), limit)
        return summarize(results, self.class_names, limit)

    def _reference(self, image_id: int) -> dict:
        objects = self._whole_rows[image_id]["objects"]
        labels = [int(self.category_ids[index]) for index in objects["category"]]
        return {
            "image_id": image_id,
            "boxes": objects["bbox"],
            "labels": labels,
            "area": objects["area"],
            "iscrowd": objects["iscrowd"],
        }

    def _check_images(self, image_ids: list[int], labels: dict[str, Tensor]) -> None:
        """Check that images come from our data. Two data sets may use the same ids, so compare sizes and annotations too."""
        if unknown := sorted(set(image_ids) - set(self.rows)):
            raise ValueError(
                f"The images {unknown[:5]} are not in the data of this CocoEvaluator; each data set needs its own evaluator."
            )
        for image_id, size, classes, boxes in zip(
            image_ids, labels["orig_size"].tolist(), labels["class_labels"], labels["boxes"], strict=True
        ):
            row, kept = self.rows[image_id], classes != PADDING_LABEL
            found, found_boxes = (size, classes[kept].tolist()), boxes[kept].float()
            expected_size = size if row["height"] is None else [row["height"], row["width"]]
            expected_classes, expected_boxes = self._targets(row["objects"], *size)
            # The tolerance of 0.01 is for boxes in half precision.
            if found != (expected_size, expected_classes) or (found_boxes - expected_boxes).abs().gt(0.01).any():
                name = id_name(self.data, image_id)
                raise ValueError(
                    f"Image {name} is evaluated with (height, width) {size} and the classes {found[1]}. In the data of "
                    f"this CocoEvaluator, the image with this id has {expected_size}, {expected_classes} or other boxes; each "
                    "data set needs its own evaluator."
                )

    def _targets(self, objects: dict[str, list], height: int, width: int) -> tuple[list[int], Tensor]:
        """Class indices and boxes, (T, 4) cxcywh in [0, 1], as the image processor makes them from the objects of an image."""
        kept = [index for index, iscrowd in enumerate(objects["iscrowd"]) if not iscrowd]
        boxes = torch.tensor([objects["bbox"][index] for index in kept]).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) / torch.tensor([width, height] * 2)
        sizes = torch.tensor([[height, width]], dtype=torch.float32)
        shares = sizes / self.image_processor.box_units(sizes)  # (1, 2), below 1 if the image is on a canvas
        return [objects["category"][index] for index in kept], xyxy_to_cxcywh(corners.clamp(0, 1)) * shares[
            :, [1, 0, 1, 0]
        ]


def _rows(data: CocoData) -> dict[int, dict]:
    """Sizes and objects of each image, by its id."""
    rows = data.dataset.select_columns(["image_id", "width", "height", "objects"])
    return {row["image_id"]: row for row in rows}


def _check_labels(labels) -> None:
    if not isinstance(labels, Mapping) or not set(_LABELS) <= set(labels):
        found = f"a {type(labels).__name__}" + (f" of {sorted(labels)}" if isinstance(labels, Mapping) else "")
        raise ValueError(
            f"The labels of the evaluation are {found}, but must be a dictionary of {sorted(_LABELS)}: pass DetectionCollator "
            "to Trainer as data_collator, and leave eval_do_concat_batches=True."
        )


def _evaluate_in_parts(
    truth: Columns, detections: Columns, category_ids: list[int], limit: int
) -> dict[int, ClassResult]:
    """`evaluate_classes`, with the classes shared among the processes of a distributed run. Each gets all results."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return evaluate_classes(truth, detections, category_ids, limit)
    parts = [None] * torch.distributed.get_world_size()
    own = category_ids[torch.distributed.get_rank() :: len(parts)]
    torch.distributed.all_gather_object(parts, evaluate_classes(truth, detections, own, limit))
    return {category_id: result for part in parts for category_id, result in part.items()}
