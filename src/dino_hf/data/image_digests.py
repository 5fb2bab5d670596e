"""Find copies of images: digests find equal files, fingerprints find images that look the same. Names are not compared."""

import base64
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from scipy.spatial.distance import cdist

from .image_facts import (
    COARSE_DISTANCE,
    COARSE_SIDE,
    MAX_ASPECT_RATIO,
    MIN_CONTRAST,
    ImageFacts,
    coarse_thumbnails,
    inspect_images,
)
from .raw import AnnotationBuilder, RawSplit
from .rows import CocoData

_END = 2**14  # bytes read at each end of a file; files of equal size with equal ends are copies
# Bytes of a digest. 10,000 images and 10,000 others have an equal digest by chance with a probability of 1e-4.
DIGEST_SIZE = 5
# Near copies are not searched for among more images, because decoding them takes minutes. Exact copies are always found.
MOST_DECODED = 5000


def image_digests(data: CocoData) -> list[bytes | None]:
    """Digest of each image file, made of its size and both of its ends. None: the file cannot be read."""
    column = data.dataset.with_format("arrow").select_columns("image")
    digests: list[bytes | None] = []
    for start in range(0, len(column), 100):
        digests += [_digest(image) for image in column[start : start + 100]["image"].to_pylist()]
    return digests


def _digest(image: Mapping) -> bytes | None:
    content, path = image.get("bytes"), image.get("path")
    if content is not None:
        return _hash(len(content), content[:_END], content[-_END:])
    if not path or not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_END)
            file.seek(max(0, size - _END))
            return _hash(size, start, file.read(_END))
    except OSError:
        return None


def _hash(size: int, start: bytes, end: bytes) -> bytes:
    return hashlib.blake2b(size.to_bytes(8, "big") + start + end, digest_size=DIGEST_SIZE).digest()


def pack(digests: Iterable[bytes | None]) -> str:
    """Sorted digests or fingerprints of equal size as text, for a model's configuration. A digest takes 7 characters."""
    return base64.b64encode(b"".join(sorted({digest for digest in digests if digest is not None}))).decode()


def unpack(text: object, size: int = DIGEST_SIZE) -> set[bytes]:
    """The digests in a text from `pack`, of `size` bytes each. Anything else gives an empty set."""
    if not isinstance(text, str):
        return set()
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        return set()
    return {content[start : start + size] for start in range(0, len(content) - size + 1, size)}


_CELLS = COARSE_SIDE**2
FINGERPRINT_SIZE = _CELLS + 2  # bytes: a grey level for each cell, and the aspect ratio as float16
# Largest change of a cell in grey levels. On 261 photographs, JPEG of quality 10 to 75 or scaling by 1/2 changes no cell by more
# than 9. An object with a tenth of the image's sides that moves changes one cell by 38.
_MAX_CELL_DIFFERENCE = 12
_CHUNK = 256  # images compared at once


def image_fingerprints(data: CocoData) -> list[bytes | None]:
    """Fingerprint of each image. None: the image cannot be read, or its contrast is too low to identify it."""
    column = data.dataset.with_format("arrow").select_columns("image")
    fingerprints: list[bytes | None] = []
    for start in range(0, len(column), _CHUNK):
        rows = column[start : start + _CHUNK]["image"].to_pylist()
        images = [{"id": row, "image": image} for row, image in enumerate(rows)]
        split = RawSplit("", data.name, images, AnnotationBuilder().build())
        fingerprints += [_fingerprint(facts) for facts in inspect_images({"": split}, decode=True)[""]]
    return fingerprints


def _fingerprint(facts: ImageFacts) -> bytes | None:
    if facts.thumbnail is None or facts.size is None or facts.thumbnail.std() < MIN_CONTRAST:
        return None
    cells = coarse_thumbnails(facts.thumbnail[None]).round().astype(np.uint8)
    return cells.tobytes() + np.array(facts.size[0] / facts.size[1], dtype="<f2").tobytes()


def are_alike(fingerprints: Collection[bytes | None], known: Collection[bytes]) -> list[bool]:
    """Whether each image looks the same as a known image: compressed again, scaled or sharpened.

    Two images look the same if all cells of a coarse thumbnail and the aspect ratio agree. Crops and mirror images do not agree.
    """
    known_cells, known_ratios = _unpack(known)
    found = []
    order = list(fingerprints)
    for start in range(0, len(order), _CHUNK):
        some = order[start : start + _CHUNK]
        cells, ratios = _unpack([one or bytes(FINGERPRINT_SIZE) for one in some])
        difference = cdist(cells, known_cells) / COARSE_SIDE  # (chunk, known) root mean square, in grey levels
        largest = cdist(cells, known_cells, "chebyshev")
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(np.log(ratios[:, None] / known_ratios))
            is_alike = (
                (difference <= COARSE_DISTANCE)
                & (largest <= _MAX_CELL_DIFFERENCE)
                & (ratio <= np.log(MAX_ASPECT_RATIO))
            )
        found += [fingerprint is not None and bool(row.any()) for fingerprint, row in zip(some, is_alike, strict=True)]
    return found


def _unpack(fingerprints: Collection[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels of the cells (L, cells) and aspect ratios (L,) of fingerprints."""
    content = np.frombuffer(b"".join(fingerprints), dtype=np.uint8).reshape(-1, FINGERPRINT_SIZE)
    ratios = np.ascontiguousarray(content[:, _CELLS:]).view("<f2")[:, 0]
    return content[:, :_CELLS].astype(np.float64), ratios.astype(np.float64)
