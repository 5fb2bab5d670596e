"""Time `pipeline("object-detection")` from image files to detections, with DINO and transformers' Deformable DETR.

python benchmarks/pipeline.py

Images are drawn scenes, enlarged to 640 x 480 and saved as PNG. They have one size, because the library needs that for batches of
Deformable DETR. Weights are random.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import DeformableDetrImageProcessor, pipeline

from common import Timed, keep, read_arguments
from detectors import DEFORMABLE, DINO, DTYPES, MODELS, build
from dino_hf import DinoDetrImageProcessor
from dino_hf.common.scenes import draw_scene
from measuring import side_by_side

PROCESSORS = {DINO: DinoDetrImageProcessor, DEFORMABLE: DeformableDetrImageProcessor}


@dataclass
class PipelineArguments(Timed):
    """Time pipelines side by side."""

    rounds: int = field(default=2, metadata={"help": "number of times that each pipeline is timed"})
    model: str = field(default="r50-4scale", metadata={"help": "model to time", "choices": list(MODELS)})
    num_images: int = field(default=4, metadata={"help": "number of images per run"})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "batch sizes"})
    shortest_edge: int = field(
        default=480,
        metadata={"help": "shorter side of the resized images, in pixels; released models use 800"},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the models", "choices": ["float32", "bfloat16"]})

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.model, self.shortest_edge = "toy", 96


def draw_files(folder: Path, num_images: int) -> list[str]:
    """Draw PNG files of 640 x 480 pixels."""
    files = []
    for number in range(num_images):
        picture, _ = draw_scene(np.random.default_rng([0, number]))
        files.append(str(folder / f"{number}.png"))
        picture.resize((640, 480)).save(files[-1])
    return files


def run_of(detector: str, files: list[str], batch_size: int, arguments: PipelineArguments) -> Callable[[], list]:
    size = {"shortest_edge": arguments.shortest_edge, "longest_edge": round(arguments.shortest_edge * 1333 / 800)}
    model = build(detector, arguments.model, arguments.device, arguments.dtype)
    detect = pipeline(
        "object-detection",
        model=model,
        image_processor=PROCESSORS[detector](size=size),
        device=arguments.device,
        dtype=DTYPES[arguments.dtype],
    )
    return lambda: detect(files, batch_size=batch_size)


def main() -> None:
    arguments = read_arguments(PipelineArguments)
    with tempfile.TemporaryDirectory() as folder:
        files = draw_files(Path(folder), arguments.num_images)
        for batch_size in arguments.batch_sizes:
            candidates = {detector: run_of(detector, files, batch_size, arguments) for detector in PROCESSORS}
            rows = side_by_side(candidates, arguments.rounds, arguments.device, warm_ups=0)
            names = ("model", "dtype", "shortest_edge", "num_images")
            case = {name: getattr(arguments, name) for name in names} | {"batch_size": batch_size}
            keep("pipeline", case, rows, arguments)


if __name__ == "__main__":
    main()
