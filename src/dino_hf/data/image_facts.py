"""Facts about image files: are they readable, how large are they, and which images are copies of each other?"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from ..common import images
from .raw import RawSplit, image_file

THUMBNAIL_SIDE = 32
COARSE_SIDE = 8  # side of the coarse thumbnails with which candidates are found
# The thresholds below are in grey levels.
# On 60 drawn scenes of about 900 x 800 pixels, JPEG of quality 30 or scaling by 1/2 changes the coarse thumbnail by at most
# 1.0 (root mean square). It changes each cell of the fine thumbnail by at most 19. If an object with a tenth of the image's
# sides moves, as in the next frame of a video, a cell changes by 60 (median).
# On 61 photographs, scaling by 1/3 and sharpening changes the coarse thumbnail by 1.0 (median) or 3.2 (95 %). All cells change: the
# largest change is 9 times the mean. For an object that moves, it is 146 times the mean.
COARSE_DISTANCE = 3.0
_TREE_DIMENSIONS = 8
_NEIGHBOURS = 64  # number of nearest images to compare with; all frames of a fixed camera would be candidates
_MAX_DIFFERENCE = 24
_MAX_MEAN_DIFFERENCE = 2.5
_MAX_SHARPENED_DIFFERENCE = 6.0  # mean for a sharpened copy; sharpening raises the differences at all edges
_MAX_PEAK = 14.0  # largest difference of a sharpened copy, as a multiple of the mean
_MIN_CORRELATION = 0.985  # lowest correlation of a sharpened copy
MIN_CONTRAST = 4.0  # standard deviation; images with less contrast all look alike
MAX_ASPECT_RATIO = 1.02  # largest ratio of the aspect ratios of two copies

_BYTES_PER_PIXEL = 8  # decoded, and as RGB
_budget = images.DecodingBudget(2**30)  # memory for decoding in all threads
_PAIRS = 10_000  # pairs compared at once
_CHUNK = 64  # images between two calls of `progress`


class ImageFacts(NamedTuple):
    """Facts about one image. Without opening it, only `is_missing` is known."""

    is_missing: bool = False
    error: str | None = None  # reason why it cannot be read
    error_kind: str | None = None  # kind of finding for the error
    size: tuple[int, int] | None = None  # width and height, upright
    stored_size: tuple[int, int] | None = None  # before its EXIF orientation turns it
    orientation: int = 1  # EXIF's; 5 to 8 swap width and height
    mode: str | None = None  # Pillow's
    format: str | None = None  # Pillow's: "JPEG", "PNG", ...
    digest: bytes | None = None  # digest of the file's bytes
    thumbnail: np.ndarray | None = None  # (THUMBNAIL_SIDE, THUMBNAIL_SIDE) uint8, grey
    values: tuple[int, int] | None = None  # lowest and highest value, only for images of more than 8 bits
    other_frames: str | None = None  # "pages" or "frames" that are not read

    @property
    def is_readable(self) -> bool:
        """Whether no error was found. An image that was not opened counts as readable if it exists."""
        return not self.is_missing and self.error is None


def image_key(image: Mapping) -> str | None:
    """Absolute path of an image. None: it is stored inside another file."""
    return None if image.get("path") is None else os.path.abspath(image["path"])


def open_file(file: Path | str | bytes) -> BinaryIO:
    """Open the file of an image without decoding it.

    Raises:
        FileNotFoundError, UnreadableImage: the file does not exist, or is not a regular file.
    """
    if isinstance(file, bytes):
        return io.BytesIO(file)
    images.check_file(file)
    return open(file, "rb")


def open_upright(image: Mapping) -> Image.Image:
    """The image as upright RGB, as training reads it."""
    return images.read_image(image_file(image))


def inspect_images(
    splits: Mapping[str, RawSplit], decode: bool, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[ImageFacts]]:
    """Facts about all images of each split, in their order.

    Args:
        decode: open and decode each image; otherwise only check that its file exists.
        progress: called with the number of images done, and of all images.
    """
    inspect = _inspect if decode else _check_exists
    images = [image for split in splits.values() for image in split.images]
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    facts = []
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2))  # decoding releases the GIL, and reading waits
    try:
        with warnings.catch_warnings():
            # Pillow warns about unusual metadata. Only the pixels matter here.
            warnings.simplefilter("ignore")
            for done in pool.map(lambda chunk: [inspect(image) for image in chunk], chunks):
                facts += done
                if progress is not None:
                    progress(len(facts), len(images))
    finally:
        pool.shutdown(cancel_futures=True)
    of_all = iter(facts)
    return {name: [next(of_all) for _ in split.images] for name, split in splits.items()}


def _check_exists(image: Mapping) -> ImageFacts:
    # An image in an Arrow table exists. Only decoding shows whether it is valid.
    return ImageFacts(is_missing=image.get("image") is None and not os.path.isfile(image.get("path") or ""))


def _inspect(image: Mapping) -> ImageFacts:
    try:
        file = image_file(image)
        with open_file(file) as opened:
            return _inspect_file(opened)
    except (FileNotFoundError, IsADirectoryError):
        return ImageFacts(is_missing=True)
    except images.TooManyPixels as error:
        return ImageFacts(error=str(error), error_kind="image-too-large")
    except images.UnknownRange as error:
        return ImageFacts(error=str(error), error_kind="image-mode-unknown")
    except OSError as error:
        return ImageFacts(error=error.strerror or str(error), error_kind="image-broken")


def _inspect_file(file: BinaryIO) -> ImageFacts:
    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    with images.open_image(file) as opened:
        stored_size, orientation = images.stored_size(opened), images.orientation(opened)
        size, mode, file_format = images.upright_size(opened), opened.mode, opened.format
        others = images.other_frames(opened)
        # A JPEG decodes faster at 1/8 of its size. The whole file is still read.
        opened.draft("RGB", (4 * THUMBNAIL_SIDE, 4 * THUMBNAIL_SIDE))
        with _budget.reserve(_BYTES_PER_PIXEL * opened.width * opened.height):
            images.load(opened)
            values = _values(opened)
            thumbnail = _thumbnail(opened)
    return ImageFacts(
        False, None, None, size, stored_size, orientation, mode, file_format, digest, thumbnail, values, others
    )


def _values(image: Image.Image) -> tuple[int, int] | None:
    """Lowest and highest value of an image with more than 8 bits. None: it has 8 bits."""
    if not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    return int(values.min()), int(values.max())


def _thumbnail(image: Image.Image) -> np.ndarray:
    """(THUMBNAIL_SIDE, THUMBNAIL_SIDE) uint8, upright."""
    side = THUMBNAIL_SIDE, THUMBNAIL_SIDE
    seen = images.to_rgb(image)  # raises an error for a mode that training cannot read
    if image.mode.startswith("I"):  # 16-bit images often use a small part of the range
        grey = np.asarray(Image.fromarray(np.asarray(image, dtype=np.float32)).resize(side, Image.Resampling.BOX))
        small = Image.fromarray((255 * (grey - grey.min()) / max(np.ptp(grey), 1)).astype(np.uint8))
    else:
        small = seen.resize(side, Image.Resampling.BOX).convert("L")
    return np.asarray(images.turn(small, images.orientation(image)))


def coarse_thumbnails(thumbnails: np.ndarray) -> np.ndarray:
    """(P, THUMBNAIL_SIDE, THUMBNAIL_SIDE) -> (P, COARSE_SIDE * COARSE_SIDE) float32, mean grey level of each cell."""
    block = THUMBNAIL_SIDE // COARSE_SIDE
    cells = thumbnails.reshape(-1, COARSE_SIDE, block, COARSE_SIDE, block).mean((2, 4), dtype=np.float32)
    return cells.reshape(len(thumbnails), -1)


def exact_copies(facts: Sequence[ImageFacts], keys: Sequence[str | None]) -> list[list[int]]:
    """Groups of images with equal bytes, or with the same file if they were not opened. Each group is in ascending order."""
    groups = {}
    for place, (fact, key) in enumerate(zip(facts, keys, strict=True)):
        identity = fact.digest or (None if fact.is_missing else key)
        if identity is not None:
            groups.setdefault(identity, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def near_copies(facts: Sequence[ImageFacts]) -> Iterator[np.ndarray]:
    """Find pairs of images that look the same but have different bytes: compressed again, scaled or sharpened.

    Crops and mirror images are not near copies. Among images with equal bytes, only the first is compared.

    Yields:
        (M, 2) places of pairs, several times.
    """
    seen, places = set(), []
    for place, fact in enumerate(facts):
        if fact.thumbnail is None or fact.digest in seen or fact.thumbnail.std() < MIN_CONTRAST:
            continue
        seen.add(fact.digest)
        places.append(place)
    if len(places) < 2:
        return
    thumbnails = np.stack([facts[place].thumbnail for place in places])  # (P, side, side)
    coarse = coarse_thumbnails(thumbnails)
    aspect_ratios = np.array([facts[place].size[0] / facts[place].size[1] for place in places])
    # A projection never increases distances, so no pair is lost. A tree with few dimensions is fast.
    coarse = coarse - coarse.mean(0)
    _, directions = np.linalg.eigh(coarse.T @ coarse)  # (cells, cells), columns in order of increasing variance
    coarse = coarse @ directions[:, -_TREE_DIMENSIONS:]
    distance = COARSE_DISTANCE * COARSE_SIDE
    _, neighbours = cKDTree(coarse).query(coarse, min(_NEIGHBOURS, len(coarse)), distance_upper_bound=distance)
    first, rank = np.nonzero(
        neighbours < len(coarse)
    )  # the query marks missing neighbours with the place after the last one
    second = neighbours[first, rank]
    is_other = first != second
    keys = np.minimum(first, second) * len(coarse) + np.maximum(first, second)
    pairs = np.column_stack(np.divmod(np.unique(keys[is_other]), len(coarse)))  # (pairs, 2), smaller place first
    for start in range(0, len(pairs), _PAIRS):
        some = pairs[start : start + _PAIRS]
        yield np.array(places)[some[_are_alike(some, thumbnails, aspect_ratios)]]


def _are_alike(pairs: np.ndarray, thumbnails: np.ndarray, aspect_ratios: np.ndarray) -> np.ndarray:
    """(len(pairs),) whether two images look the same."""
    first, second = pairs.T
    difference = np.abs(thumbnails[first].astype(np.int16) - thumbnails[second])  # (len(pairs), side, side)
    largest, mean = difference.max((1, 2)), difference.mean((1, 2))
    is_equal = (largest <= _MAX_DIFFERENCE) & (mean <= _MAX_MEAN_DIFFERENCE)
    is_sharpened = (
        (mean <= _MAX_SHARPENED_DIFFERENCE)
        & (largest <= _MAX_PEAK * mean)
        & (_correlations(thumbnails[first], thumbnails[second]) >= _MIN_CORRELATION)
    )
    ratio = aspect_ratios[first] / aspect_ratios[second]
    return (is_equal | is_sharpened) & (np.maximum(ratio, 1 / ratio) <= MAX_ASPECT_RATIO)


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P,) Pearson correlation of each pair of (P, side, side) thumbnails."""
    first, second = (values.reshape(len(values), -1).astype(np.float32) for values in (first, second))
    first, second = (values - values.mean(1, keepdims=True) for values in (first, second))
    return (first * second).sum(1) / np.sqrt((first**2).sum(1) * (second**2).sum(1))
