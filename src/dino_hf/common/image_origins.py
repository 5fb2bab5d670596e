"""Read an image from a file, an address, an array or an image in memory."""

from pathlib import Path

import numpy as np
from PIL import Image

from . import images
from .downloads import download
from .free_memory import free_main_memory
from .images import open_image
from .text import size_text

_LARGE = 2**24  # pixels; smaller images fit anywhere
# Peak memory of reading and resizing, per pixel. Measured with 16-bit grey, which takes most.
_BYTES_PER_PIXEL = 16


def read_image(origin: Path | str | Image.Image | np.ndarray) -> Image.Image:
    """An upright RGB image, read as in `common.images.read_image`.

    Transparency is composited on white, 16-bit grey is scaled from its full range, and only the first frame of an animation is
    read.

    Raises:
        OSError, ValueError: the image cannot be read, or it is unknown which value is white.
    """
    if isinstance(origin, np.ndarray):
        if origin.dtype != np.uint8 or not (origin.ndim == 2 or (origin.ndim == 3 and origin.shape[2] in (3, 4))):
            raise ValueError(
                f"An array is {origin.dtype} of shape {origin.shape}; it must be uint8, (h, w, 3) RGB or (h, w)."
            )
        return images.read_image(Image.fromarray(np.ascontiguousarray(origin)))
    content = download(origin) if isinstance(origin, str) else origin
    if not isinstance(content, Image.Image):
        _check_memory(content)
    return images.read_image(content)


def _check_memory(origin: Path | bytes) -> None:
    """Refuse an image that does not fit in free memory. Otherwise the system would kill the process."""
    with open_image(origin) as image:
        num_pixels, size = image.width * image.height, f"{image.width} x {image.height}"
    needed = _BYTES_PER_PIXEL * num_pixels
    if num_pixels > _LARGE and needed > (free := free_main_memory()):
        raise OSError(
            f"It has {size} pixels, which need about {size_text(needed)} of memory, and {size_text(free)} are free; "
            "scale it down, or cut it into parts."
        )
