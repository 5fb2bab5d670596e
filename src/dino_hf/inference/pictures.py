"""Draw detections on images, and save the pictures."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ..common.drawing import draw_boxes
from ..common.output_folders import replace_file
from ..common.text import abbreviate
from .predictor import Detections

_LONGEST_NAME = 80  # characters of a class name in a label


def draw_detections(
    image: Image.Image, detections: Detections, id2label: Mapping[int, str], *, enlarge: bool = True
) -> Image.Image:
    """A copy of an image with boxes, coloured by class, and labels "name 0.87", which stay inside the image.

    A label that would hide a label with a higher score is left out.

    Args:
        image: RGB.
        id2label: class index -> name.
        enlarge: an image below 320 pixels is enlarged by a whole number.
    """
    names = [abbreviate(id2label[int(label)], _LONGEST_NAME) for label in detections.labels]
    texts = [f"{name} {score:.2f}" for name, score in zip(names, detections.scores, strict=True)]
    return draw_boxes(image, detections.boxes, detections.labels, texts, enlarge=enlarge)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save a picture as PNG if its name ends in .png, else as JPEG. A half-written file is never left behind."""
    is_png = path.suffix.lower() == ".png"
    with replace_file(path) as new:
        picture.save(new, format="PNG" if is_png else "JPEG", **({"compress_level": 3} if is_png else {"quality": 92}))
