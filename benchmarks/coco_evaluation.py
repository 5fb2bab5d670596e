"""Time the COCO evaluation of random detections: `CocoEvaluator` as `Trainer` calls it, and plain pycocotools.

python benchmarks/coco_evaluation.py

Both get the same detections and give the same numbers. `CocoEvaluator` starts from arrays, pycocotools from COCO's list of results.
Both times end with the twelve numbers. Reading the annotations is not timed.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import EvalPrediction

from common import CpuOnly, keep, read_arguments
from dino_hf import DinoDetrImageProcessor
from dino_hf.evaluation.coco import NAMES
from dino_hf.model.box_ops import xyxy_to_cxcywh
from dino_hf.training import CocoData, CocoEvaluator
from measuring import side_by_side

HEIGHT, WIDTH = 480, 640
OURS, PLAIN = "CocoEvaluator", "pycocotools"


@dataclass
class EvaluationArguments(CpuOnly):
    """Time evaluations side by side."""

    rounds: int = field(default=1, metadata={"help": "number of times that each evaluation is timed"})
    num_images: int = field(default=5000, metadata={"help": "number of images"})
    num_classes: int = field(default=80, metadata={"help": "number of classes"})
    num_detections: int = field(default=50, metadata={"help": "number of detections per image"})
    batch_size: int = field(default=50, metadata={"help": "images per batch"})

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.num_images, self.num_classes, self.num_detections, self.batch_size = 12, 4, 10, 5


@dataclass
class Case:
    """Annotations and detections of I images. Boxes are (x0, y0, x1, y1) in pixels; category ids are 0 to K - 1."""

    true_classes: list[np.ndarray]  # I x (T,)
    true_boxes: list[np.ndarray]  # I x (T, 4)
    classes: np.ndarray  # (I, N)
    scores: np.ndarray  # (I, N)
    boxes: np.ndarray  # (I, N, 4)


def generate(arguments: EvaluationArguments) -> Case:
    """Generate 1 to 14 objects per image; COCO has 7. A fifth of the detections are near objects, mostly of their class."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        corners = rng.uniform(0, 0.6, (count, 2)) * (WIDTH, HEIGHT)
        return np.concatenate([corners, corners + np.exp(rng.uniform(2, 5, (count, 2)))], axis=1).clip(
            0, (WIDTH, HEIGHT) * 2
        )

    shape = (arguments.num_images, arguments.num_detections)
    case = Case(
        [rng.integers(0, arguments.num_classes, count) for count in rng.integers(1, 15, arguments.num_images)],
        [],
        rng.integers(0, arguments.num_classes, shape),
        np.sort(rng.random(shape, dtype=np.float32))[:, ::-1].copy(),
        draw(shape[0] * shape[1]).reshape(*shape, 4).astype(np.float32),
    )
    for index, classes in enumerate(case.true_classes):
        case.true_boxes.append(draw(len(classes)))
        near = rng.integers(0, len(classes), max(1, arguments.num_detections // 5))
        places = rng.choice(arguments.num_detections, len(near), replace=False)
        case.boxes[index, places] = case.true_boxes[index][near] + rng.normal(0, 3, (len(near), 4))
        right = rng.random(len(near)) < 0.8
        case.classes[index, places[right]] = classes[near[right]]
    return case


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def our_evaluation(case: Case, arguments: EvaluationArguments) -> Callable[[], dict[str, float]]:
    rows = [
        {
            "image_id": index,
            "height": HEIGHT,
            "width": WIDTH,
            "objects": {
                "bbox": _xywh(boxes).tolist(),
                "category": classes.tolist(),
                "area": _xywh(boxes)[:, 2:].prod(axis=1).tolist(),
                "iscrowd": [0] * len(classes),
            },
        }
        for index, (classes, boxes) in enumerate(zip(case.true_classes, case.true_boxes, strict=True))
    ]
    ids = list(range(arguments.num_classes))
    data = CocoData(datasets.Dataset.from_list(rows), {index: f"class {index}" for index in ids}, ids)
    evaluator = CocoEvaluator(data, DinoDetrImageProcessor())
    batches = list(_batches(case, arguments.batch_size))

    def run() -> dict[str, float]:
        for batch in batches[:-1]:
            evaluator(batch, compute_result=False)
        return {name: value for name, value in evaluator(batches[-1]).items() if name in NAMES}

    return run


def _batches(case: Case, batch_size: int) -> Iterator[EvalPrediction]:
    """As `Trainer` hands them over: the kept detections, and labels padded to the most boxes of an image."""
    most, scale = max(map(len, case.true_classes)), torch.tensor([WIDTH, HEIGHT] * 2)
    for start in range(0, len(case.classes), batch_size):
        image_ids = torch.arange(start, min(start + batch_size, len(case.classes)))
        classes, boxes = torch.full((len(image_ids), most), -100), torch.zeros(len(image_ids), most, 4)
        for row, index in enumerate(image_ids.tolist()):
            count = len(case.true_classes[index])
            classes[row, :count] = torch.from_numpy(case.true_classes[index])
            boxes[row, :count] = xyxy_to_cxcywh(torch.from_numpy(case.true_boxes[index]).float() / scale)
        detections = {"scores": case.scores, "labels": case.classes.astype(np.int32), "boxes": case.boxes}
        yield EvalPrediction(
            predictions={name: values[image_ids.numpy()] for name, values in detections.items()},
            label_ids={
                "image_id": image_ids,
                "orig_size": torch.tensor([[HEIGHT, WIDTH]] * len(image_ids)),
                "class_labels": classes,
                "boxes": boxes,
            },
        )


def plain_evaluation(case: Case, arguments: EvaluationArguments) -> Callable[[], dict[str, float]]:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": index} for index in range(arguments.num_images)],
        "categories": [{"id": index} for index in range(arguments.num_classes)],
        "annotations": [],
    }
    for index, (classes, boxes) in enumerate(zip(case.true_classes, case.true_boxes, strict=True)):
        for category, box in zip(classes.tolist(), _xywh(boxes).tolist(), strict=True):
            entry = {"image_id": index, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            truth.dataset["annotations"].append({"id": len(truth.dataset["annotations"]) + 1, **entry})
    _silently(truth.createIndex)()
    columns = (case.classes.tolist(), _xywh(case.boxes.astype(np.float64)).tolist(), case.scores.astype(float).tolist())
    results = [
        {"image_id": index, "category_id": category, "bbox": box, "score": score}
        for index, image in enumerate(zip(*columns, strict=True))
        for category, box, score in zip(*image, strict=True)
    ]

    def run() -> dict[str, float]:
        evaluation = COCOeval(truth, truth.loadRes([dict(one) for one in results]), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return dict(zip(NAMES, map(float, evaluation.stats), strict=True))

    return _silently(run)


def _silently(run: Callable) -> Callable:
    def silent():
        with contextlib.redirect_stdout(io.StringIO()):
            return run()

    return silent


def main() -> None:
    arguments = read_arguments(EvaluationArguments)
    case = generate(arguments)
    scores, candidates = {}, {}
    for name, evaluation in ((OURS, our_evaluation), (PLAIN, plain_evaluation)):
        run = evaluation(case, arguments)
        candidates[name] = lambda name=name, run=run: scores.update({name: run()})
    rows = side_by_side(candidates, arguments.rounds, warm_ups=0, apart=False)
    for row in rows:
        row["AP"] = scores[row["candidate"]]["AP"]
    names = ("num_images", "num_classes", "num_detections")
    keep("coco_evaluation", {name: getattr(arguments, name) for name in names}, rows, arguments)
    print(f"  AP {rows[0]['AP']:.6f}, and all twelve numbers equal: {scores[OURS] == scores[PLAIN]}")


if __name__ == "__main__":
    main()
