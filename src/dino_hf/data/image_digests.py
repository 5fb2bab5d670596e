"""Find copies of images by short digests of their content. Names are not compared."""

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping

import numpy as np

from .image_facts import exact_copies, image_key, look_at_images, near_copies
from .raw import RawSplit
from .rows import CocoData

_END = 2**14  # bytes read at each end of a file: images of equal size that agree there are copies
_SIZE = 5  # bytes of a digest: 10,000 images compared with as many others agree by chance in 1 of 10,000 cases
# At most so many images are decoded to find near copies, because more would take minutes. Exact copies are always found.
MOST_DECODED = 5000
# Share of the images. A larger group of near copies is taken for frames of a fixed camera, which cannot be split by groups.
MOST_NEAR = 0.5


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
    return hashlib.blake2b(size.to_bytes(8, "big") + start + end, digest_size=_SIZE).digest()


def pack(digests: Iterable[bytes | None]) -> str:
    """Sorted digests or fingerprints of one size as text, for a model's configuration. A digest takes 7 characters."""
    return base64.b64encode(b"".join(sorted({digest for digest in digests if digest is not None}))).decode()


def unpack(text: object, size: int = _SIZE) -> set[bytes]:
    """The digests in a text from `pack`, of `size` bytes each. Anything else gives an empty set."""
    if not isinstance(text, str):
        return set()
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        return set()
    return {content[start : start + size] for start in range(0, len(content) - size + 1, size)}


def copy_groups(split: RawSplit, data: CocoData) -> tuple[list[int], list[str]]:
    """Group images that are copies. A group must not be both trained on and held out.

    Copies are files of equal content, images that look the same after compression or scaling, and Roboflow's augmented copies
    (named <photo>.rf.<hash>.jpg).

    Args:
        split: the source of `data`, with the same images in the same order.
    Returns:
        a group number for each image, and notes for the user.
    """
    names = data.dataset.select_columns("file_name")[:]["file_name"]
    by_name = _Groups(len(names))
    by_name.join_equal([_photo(name) for name in names])
    exact = by_name.copy()
    exact.join_equal(image_digests(data))
    if len(names) > MOST_DECODED:
        note = f"Of {len(names)} images only exact copies are kept on one side of the split; near copies are not looked for."
        near, notes = exact, [note]
    else:
        near, notes = exact.copy(), []
        facts = look_at_images({"": split}, decode=True)[""]
        for group in exact_copies(facts, [image_key(image) for image in split.images]):
            near.join_all(group)
        for pairs in near_copies(facts):
            for pair in pairs.tolist():
                near.join_all(pair)
    most = max(np.bincount(near.numbers()), default=0)
    if most > max(2, MOST_NEAR * len(names)) and near.numbers() != exact.numbers():
        notes.append(
            f"{most} of {len(names)} images look the same, as of a fixed camera, so near copies may be on both sides of the split."
        )
        near = exact
    numbers = near.numbers()
    if (num_groups := len(set(numbers))) > 1:
        if num_groups < len(names):
            notes.append(
                f"{len(names) - num_groups} of {len(names)} images are copies of others and stay on the side of these."
            )
        return numbers, notes
    notes.append("All images are copies of one, so copies may be on both sides of the split.")
    return by_name.numbers(), notes


def _photo(name: str | None) -> str | None:
    return name.split(".rf.")[0] if name and ".rf." in name else None


class _Groups:
    """Disjoint sets of places (union-find)."""

    def __init__(self, num: int):
        self._parent = list(range(num))

    def copy(self) -> "_Groups":
        other = _Groups(0)
        other._parent = list(self._parent)
        return other

    def find(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def join_all(self, places: Iterable[int]) -> None:
        roots = sorted({self.find(place) for place in places})
        for root in roots[1:]:
            self._parent[root] = roots[0]

    def join_equal(self, keys: Iterable[object]) -> None:
        """Join places with equal keys. None is no key."""
        places: dict[object, int] = {}
        for place, key in enumerate(keys):
            if key is not None:
                self.join_all((place, places.setdefault(key, place)))

    def numbers(self) -> list[int]:
        return [self.find(place) for place in range(len(self._parent))]
