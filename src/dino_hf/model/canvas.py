"""The square canvas of models that were trained with large-scale jitter. Its padding is not masked."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config_checks import is_number


def check_canvas(value, size, pad_size=None, do_pad: bool | None = True) -> None:
    """Check the settings of an image processor with a canvas.

    Args:
        value: `canvas_value`, the value of the canvas's pixels beside the image, in [0, 255]. None: no canvas.
        size: `size`, whose edges must both be the side of the canvas.
        pad_size, do_pad: must have their default values, because the canvas has a fixed size.
    Raises:
        ValueError: a value is wrong.
    """
    if value is None:
        return
    if not (is_number(value) and 0 <= value <= 255):
        raise ValueError(
            f"canvas_value={value!r:.50} must be the value of a pixel, a number in [0, 255]; 114 in Co-DINO."
        )
    edges = dict(size or {})
    if edges.keys() != {"shortest_edge", "longest_edge"} or edges["shortest_edge"] != edges["longest_edge"]:
        raise ValueError(
            f"canvas_value={value} needs a size whose edges are both the side of the square canvas, such as "
            f'{{"shortest_edge": 1024, "longest_edge": 1024}}, but size is {edges!r:.200}.'
        )
    if pad_size is not None or not do_pad:
        wrong = f"do_pad={do_pad!r:.20}" if pad_size is None else f"pad_size={dict(pad_size)!r:.100}"
        raise ValueError(f"canvas_value={value} pads all images to a square of the side in size, so leave out {wrong}.")


def fit_canvas(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of an image after it is resized so that its longer side is `side`. Rounded as in mmdetection."""
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def place_on_canvas(image, side: int, value: float):
    """Place an image at the top left of a square canvas.

    Args:
        image: (3, h, w), a tensor or a NumPy array.
        value: value of the pixels beside the image.
    Returns:
        (3, side, side), of the same type.
    Raises:
        ValueError: the image is larger than the canvas.
    """
    height, width = image.shape[-2:]
    if max(height, width) > side:
        raise ValueError(
            f"An image of {width} x {height} pixels does not fit on the canvas of {side} x {side}. Let the image processor resize "
            "it, or choose smaller sizes for training images."
        )
    canvas = F.pad(torch.as_tensor(image), (0, side - width, 0, side - height), value=value)
    return canvas if isinstance(image, Tensor) else canvas.numpy()


def canvas_in_pixels(sizes: Tensor, side: int) -> Tensor:
    """The size of the canvas in pixels of the original images.

    Args:
        sizes: (B, 2) height and width of the images before they were resized.
    Returns:
        (B, 2) float32 height and width. Both are at least those of the image, up to rounding of the resized image.
    """
    resized = [fit_canvas(*size, side) for size in sizes.tolist()]
    return (side * sizes.double() / torch.tensor(resized, dtype=torch.float64)).float()
