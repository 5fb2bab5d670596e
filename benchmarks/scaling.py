"""Measure how time grows: inference with pixels and queries, a training step and its loss with boxes.

python benchmarks/scaling.py

All points of a curve run side by side, and the curve shows their ratios.
"""

from dataclasses import dataclass, field

from common import Timed, keep, parse_size, read_arguments
from detectors import DEFORMABLE, DINO, DTYPES, MODELS, build, detection, random_images, random_labels
from measuring import side_by_side
from training_step import RecordingLoss, make_optimizer, training_step


@dataclass
class ScalingArguments(Timed):
    """Time inputs of growing size side by side."""

    rounds: int = field(default=2, metadata={"help": "number of times that each point is timed"})
    model: str = field(default="r50-4scale", metadata={"help": "model to time", "choices": list(MODELS)})
    sizes: list[str] = field(
        default_factory=lambda: ["240x320", "320x480", "480x640", "640x960"],
        metadata={"help": "image sizes, height x width"},
    )
    num_queries: list[int] = field(
        default_factory=lambda: [100, 300, 900, 2000], metadata={"help": "numbers of queries"}
    )
    num_boxes: list[int] = field(
        default_factory=lambda: [1, 10, 50, 100, 200, 500], metadata={"help": "numbers of boxes per image"}
    )
    queries_size: str = field(
        default="480x640", metadata={"help": "image size for the curve over queries, height x width"}
    )
    boxes_size: str = field(
        default="320x480", metadata={"help": "size of the two images for the curve over boxes, height x width"}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of inference", "choices": list(DTYPES)})
    mode: str = field(
        default="eager", metadata={"help": "mode of DINO for the curve over pixels", "choices": ["eager", "dynamic"]}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.model, self.queries_size, self.boxes_size = "toy", "64x104", "64x104"
            self.sizes, self.num_queries, self.num_boxes = ["64x104", "96x160"], [5, 20], [1, 12]


def over_pixels(arguments: ScalingArguments) -> list[dict]:
    candidates, points = {}, []
    for detector in (DINO, DEFORMABLE):
        model = build(detector, arguments.model, arguments.device, arguments.dtype)
        mode = arguments.mode if detector == DINO else "eager"
        for size in arguments.sizes:
            height, width = parse_size(size)
            images = random_images(1, height, width, arguments.device)
            detect = detection(detector, model, images, arguments.dtype, mode)
            candidates[f"{detector}, {size}"] = detect
            points.append({"detector": detector, "pixels": height * width})
    return _measured(candidates, points, arguments)


def over_queries(arguments: ScalingArguments) -> list[dict]:
    images = random_images(1, *parse_size(arguments.queries_size), arguments.device)
    candidates, points = {}, []
    for number in arguments.num_queries:
        model = build(DINO, arguments.model, arguments.device, arguments.dtype, num_queries=number)
        candidates[f"{DINO}, {number} queries"] = detection(DINO, model, images, arguments.dtype)
        points.append({"detector": DINO, "num_queries": number})
    return _measured(candidates, points, arguments)


def over_boxes(arguments: ScalingArguments) -> list[dict]:
    """Time training steps, and the loss alone on the predictions of each step. All steps train the same model."""
    images = random_images(2, *parse_size(arguments.boxes_size), arguments.device)
    model = build(DINO, arguments.model, arguments.device)
    optimizer, criterion = make_optimizer(model), model.criterion
    steps, losses = {}, {}
    for number in arguments.num_boxes:
        step = training_step(DINO, model, optimizer, images, random_labels(2, number, arguments.device))
        model.criterion = loss = RecordingLoss(criterion)
        step()
        boxes = "1 box" if number == 1 else f"{number} boxes"
        steps[f"step, {boxes}"], losses[f"loss, {boxes}"] = step, loss.forward_and_backward
    model.criterion = criterion
    points = [{"part": part, "num_boxes": number} for part in ("step", "loss") for number in arguments.num_boxes]
    return _measured(steps | losses, points, arguments)


def _measured(candidates: dict, points: list[dict], arguments: ScalingArguments) -> list[dict]:
    rows = side_by_side(candidates, arguments.rounds, arguments.device, warm_ups=0)
    return [row | point for row, point in zip(rows, points, strict=True)]


def main() -> None:
    arguments = read_arguments(ScalingArguments)
    model, dtype = {"model": arguments.model}, {"dtype": arguments.dtype}
    cases = [
        ({"over": "pixels", **model, **dtype, "mode": arguments.mode}, over_pixels),
        ({"over": "queries", "size": arguments.queries_size, **model, **dtype}, over_queries),
        ({"over": "boxes", "size": arguments.boxes_size, **model}, over_boxes),
    ]
    for case, measure in cases:
        keep("scaling", case, measure(arguments), arguments)


if __name__ == "__main__":
    main()
