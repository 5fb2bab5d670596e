"""Time the image processors of DINO and of transformers' Deformable DETR, with torchvision and with PIL.

python benchmarks/image_processing.py

A PIL image of 480 x 640 becomes pixel values at 800 x 1066, without annotations and with 20 annotated boxes.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from transformers import DeformableDetrImageProcessor
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil

from common import CpuOnly, keep, parse_size, read_arguments
from detectors import DEFORMABLE, DINO, NUM_LABELS
from dino_hf import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from measuring import side_by_side

PROCESSORS = {
    f"{DINO}, torchvision": DinoDetrImageProcessor,
    f"{DEFORMABLE}, torchvision": DeformableDetrImageProcessor,
    f"{DINO}, PIL": DinoDetrImageProcessorPil,
    f"{DEFORMABLE}, PIL": DeformableDetrImageProcessorPil,
}


@dataclass
class ImageProcessingArguments(CpuOnly):
    """Time image processors side by side."""

    rounds: int = field(default=15, metadata={"help": "number of times that each processor is timed"})
    size: str = field(default="480x640", metadata={"help": "size of the original image, height x width"})
    num_boxes: int = field(default=20, metadata={"help": "number of boxes of the annotated image"})


def annotated_image(height: int, width: int, num_boxes: int) -> tuple[Image.Image, dict]:
    """An image of noise, and COCO annotations."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    corners = rng.uniform(0, 0.5, (num_boxes, 2)) * (width, height)
    sizes = rng.uniform(0.1, 0.4, (num_boxes, 2)) * (width, height)
    annotations = [
        {
            "bbox": [*corner, *size],
            "category_id": int(rng.integers(NUM_LABELS)),
            "area": float(np.prod(size)),
            "iscrowd": 0,
        }
        for corner, size in zip(corners.tolist(), sizes.tolist(), strict=True)
    ]
    return image, {"image_id": 1, "annotations": annotations}


def main() -> None:
    arguments = read_arguments(ImageProcessingArguments)
    image, annotations = annotated_image(*parse_size(arguments.size), arguments.num_boxes)
    resize = {"size": {"shortest_edge": 96, "longest_edge": 160}} if arguments.quick else {}
    processors = {name: kind(**resize) for name, kind in PROCESSORS.items()}
    for inputs, given in (("image", {}), ("image and boxes", {"annotations": annotations})):
        candidates = {
            name: lambda processor=processor, given=given: processor(images=image, return_tensors="pt", **given)
            for name, processor in processors.items()
        }
        rows = side_by_side(candidates, arguments.rounds)
        keep("image_processing", {"original": arguments.size, "inputs": inputs}, rows, arguments)


if __name__ == "__main__":
    main()
