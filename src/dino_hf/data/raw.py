"""The content of a data set's files before any check, so that broken data can be inspected. All formats use COCO's fields."""

import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from ..common import images
from ..common.values import is_number

SPLITS = ("train", "validation", "test")
MOST_PIXELS = 2**31  # a side of an image or box has fewer
_TOO_LARGE = 1e100  # the product of two smaller numbers is finite


class Problem(NamedTuple):
    """Something that could not be read."""

    # "unreadable-file", "unreadable-image", "missing-file", "missing-folder", "missing-list", "bad-entry", "bad-line",
    # "two-files-for-a-split", "outside"
    kind: str
    where: str  # the file, and the entry or line in it
    message: str  # one sentence


@dataclass(frozen=True, eq=False)
class Annotations(Sequence):
    """The N annotations of a split in columns, in the order of the files.

    An item is a dictionary with COCO's fields and `where`. Values are as in the files: sizes may be negative, numbers NaN or
    infinite, and ids may be repeated or unknown.
    """

    image_id: np.ndarray  # (N,) int64
    category_id: np.ndarray  # (N,) int64
    bbox: np.ndarray  # (N, 4) float64: x, y, width, height in pixels
    area: np.ndarray  # (N,) float64. NaN: not in the files. -inf: NaN in the files.
    iscrowd: np.ndarray  # (N,) bool
    id: np.ndarray  # (N,) object. None: not in the files.
    origin: np.ndarray  # (N, 2) int64: place in `files`, and number of the entry or line
    files: Sequence  # file names or other texts for {0} of `where_format`
    where_format: str  # "annotations[{1}]", "{0}, line {1}"

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, place: int) -> dict[str, Any]:
        entry = {
            "id": self.id[place],
            "image_id": int(self.image_id[place]),
            "category_id": int(self.category_id[place]),
            "bbox": self.bbox[place].tolist(),
            "area": None if math.isnan(self.area[place]) else float(self.area[place]),
            "iscrowd": int(self.iscrowd[place]),
            "where": self.where(place),
        }
        return {name: value for name, value in entry.items() if value is not None}

    def __repr__(self) -> str:
        return f"Annotations({len(self)})"

    def where(self, place: int) -> str:
        """Where in the files an annotation is, such as "annotations[3]" or "labels/7.txt, line 3"."""
        file, number = self.origin[place].tolist()
        return self.where_format.format(self.files[file] if self.files else "", number)

    def select(self, is_kept: np.ndarray) -> "Annotations":
        """The annotations for which the (N,) mask is True."""
        columns = ("image_id", "category_id", "bbox", "area", "iscrowd", "id", "origin")
        return replace(self, **{name: getattr(self, name)[is_kept] for name in columns})


class AnnotationBuilder:
    """Collects annotations one by one in compact columns.

    Args:
        where_format, files: as in `Annotations`.
    """

    def __init__(self, where_format: str = "annotations[{1}]", files: Sequence = ()):
        self.where_format, self.files = where_format, files
        self._image_ids, self._category_ids, self._origins = array("q"), array("q"), array("q")
        self._boxes, self._areas, self._crowds = array("d"), array("d"), array("b")
        self._ids: list = []

    def add(
        self, image_id: int, category_id: int, bbox: Sequence[float], number: int, file: int = 0, area: float | None = None,
        iscrowd: float | None = None, annotation_id: Any = None,
    ) -> None:  # fmt: skip
        self._image_ids.append(image_id)
        self._category_ids.append(category_id)
        self._boxes.extend(bbox)
        self._areas.append(math.nan if area is None else -math.inf if area != area else area)
        self._crowds.append(bool(iscrowd))
        self._ids.append(annotation_id)
        self._origins.extend((file, number))

    def build(self) -> Annotations:
        ids = np.empty(len(self._ids), dtype=object)
        ids[:] = self._ids
        return Annotations(
            np.array(self._image_ids, dtype=np.int64),
            np.array(self._category_ids, dtype=np.int64),
            np.array(self._boxes, dtype=np.float64).reshape(-1, 4),
            np.array(self._areas, dtype=np.float64),
            np.array(self._crowds, dtype=bool),
            ids,
            np.array(self._origins, dtype=np.int64).reshape(-1, 2),
            self.files,
            self.where_format,
        )


class RawSplit(NamedTuple):
    """Images and annotations of one part of a data set, as the files have them.

    Readers guarantee types only: an image has an integer `id` and a `file_name`, an annotation an integer `image_id` and
    `category_id` and four numbers as `bbox`. Entries with other types are `Problem`s of the data set.
    """

    name: str  # "train", "validation" or "test"; or another name from the data set
    origin: Path | str  # the json, folder or Hub id that it was read from, for messages
    # COCO's fields: id, file_name, width, height (None if the data do not state them). Each entry also has either `path` or
    # `image`. `path` is absolute; if the file is missing, `candidates` lists files that could be the image. `image` is a
    # mapping with bytes and path, read on access.
    images: list[dict]
    annotations: Annotations
    stored: Dataset | None = None  # column `image`, undecoded, that holds the `image`s of a Hugging Face data set

    def __repr__(self) -> str:
        return f"RawSplit({self.name!r:.100}: {len(self.images)} images, {len(self.annotations)} annotations)"


class RawDataset(NamedTuple):
    """All parts of a data set."""

    format: str  # "coco", "yolo", "voc", "huggingface"
    origin: Path | str
    splits: dict[str, RawSplit]
    categories: list[
        dict
    ]  # categories of all splits: id, name, supercategory?; ids as in the first split that has the class
    problems: list[Problem]
    notes: list[str] = []  # noqa: RUF012  decisions made while reading; never changed in place

    def __repr__(self) -> str:
        splits = ", ".join(f"{name:.100} {len(one.images)} images" for name, one in list(self.splits.items())[:10])
        return (
            f"RawDataset({str(self.origin)!r:.100}, {self.format}: {splits}; {len(self.categories)} categories, "
            f"{len(self.problems)} problems)"
        )


class StoredImage(Mapping):
    """{"bytes", "path"} of a row. They are read on access, because the images of a data set do not fit in memory."""

    __slots__ = ("dataset", "row")

    def __init__(self, dataset: Dataset, row: int):
        self.dataset, self.row = dataset, row

    def __getitem__(self, key: str):
        return (self.dataset[self.row]["image"] or dict.fromkeys(self))[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("bytes", "path"))

    def __len__(self) -> int:
        return 2


def open_image(entry: Mapping) -> Image.Image:
    """Open the image of an entry of `RawSplit.images`, without decoding it and without turning it by its EXIF orientation.

    Raises:
        OSError: the image is missing or cannot be read.
    """
    return images.open_image(image_file(entry))


def image_file(entry: Mapping) -> Path | str | bytes:
    """The path, or the bytes, of the image of an entry of `RawSplit.images`.

    Raises:
        FileNotFoundError: the entry has neither.
    """
    if entry.get("image") is None:
        return entry["path"]
    stored = entry["image"]
    if (content := stored["bytes"]) is not None:
        return content
    if not stored["path"]:
        raise FileNotFoundError(f"Image {entry['id']} is empty: it has neither bytes nor a path.")
    return stored["path"]


def in_order(splits: dict) -> dict:
    """Sort splits: train, validation, test, others."""
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS)))


# -- boxes with the images and categories that they belong to


class BoxTable(NamedTuple):
    """The N annotations of a split, in their order, with ids resolved."""

    boxes: np.ndarray  # (N, 4) float64 as in the files; a whole row is NaN if one number is not finite or too large
    image: np.ndarray  # (N,) place of the image in `split.images`; -1 if no image has the id
    category: np.ndarray  # (N,) place in the categories; -1 if no category has the id
    is_crowd: np.ndarray  # (N,) bool
    area: np.ndarray  # (N,) NaN: not in the files. -inf: no usable number in the files.
    sizes: np.ndarray  # (N, 2) width and height of the image; NaN if unknown

    @property
    def is_number(self) -> np.ndarray:
        """(N,) whether a box is four usable numbers."""
        return np.isfinite(self.boxes).all(1)

    @property
    def corners(self) -> np.ndarray:
        """(N, 4) x0, y0, x1, y1, if the files mean (x, y, width, height) in pixels."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)


def make_box_table(split: RawSplit, categories: Sequence[dict], image_sizes: np.ndarray | None = None) -> BoxTable:
    """Resolve the image and category ids of a split's annotations.

    Args:
        image_sizes: (I, 2) width and height of the images on which the boxes were drawn. None: the stated sizes.
    """
    annotations = split.annotations
    image = _places(annotations.image_id, [entry["id"] for entry in split.images])
    sizes = np.full((len(annotations), 2), np.nan)
    sizes[image >= 0] = (stated_sizes(split) if image_sizes is None else image_sizes)[image[image >= 0]]
    is_usable = (np.abs(annotations.bbox) < MOST_PIXELS).all(1, keepdims=True)
    return BoxTable(
        boxes=np.where(is_usable, annotations.bbox, np.nan),
        image=image,
        category=_places(annotations.category_id, [entry["id"] for entry in categories]),
        is_crowd=annotations.iscrowd,
        area=np.where(annotations.area >= _TOO_LARGE, -np.inf, annotations.area),
        sizes=sizes,
    )


def stated_sizes(split: RawSplit) -> np.ndarray:
    """(I, 2) width and height of each image as stated; NaN if they are not stated or not positive numbers."""
    sizes = [(image.get("width"), image.get("height")) for image in split.images]
    known = [
        size if all(is_number(side) and 0 < side < _TOO_LARGE for side in size) else (math.nan, math.nan)
        for size in sizes
    ]
    return np.array(known, dtype=np.float64).reshape(-1, 2)


def count_boxes(table: BoxTable, num_images: int) -> np.ndarray:
    """(I,) number of annotations of each image."""
    return np.bincount(table.image[table.image >= 0], minlength=num_images)


def _places(ids: np.ndarray, known: Sequence[int]) -> np.ndarray:
    """(N,) first place of each id in `known`; -1 if it is not there."""
    if not len(known):
        return np.full(len(ids), -1)
    known = np.array(known, dtype=np.int64)
    order = np.argsort(known, kind="stable")
    found = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[found] == ids, found, -1)


def number_text(value: float) -> str:
    """A number for messages: whole numbers without a decimal point, others with four digits."""
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.4g}"


def area_text(area: float) -> str:
    """The text of a value of `Annotations.area`."""
    return number_text(math.nan if area == -math.inf else area)


# -- categories of several splits, sizes that are not stated


def are_supercategories(categories: Sequence[dict]) -> list[bool]:
    """Whether each category is the supercategory of another one. The two may have the same name, as in exports of one class."""
    entries_of: dict[str, set[int]] = {}
    for place, entry in enumerate(categories):
        if isinstance(entry.get("supercategory"), str):
            entries_of.setdefault(entry["supercategory"], set()).add(place)
    return [bool(entries_of.get(entry.get("name"), set()) - {place}) for place, entry in enumerate(categories)]


def merge_categories(categories: list[dict], split: RawSplit, own: list[dict]) -> tuple[RawSplit, list[str]]:
    """Merge the categories of a split into the earlier ones. If the split has other ids for the same names, change its ids.

    Args:
        categories: the categories of earlier splits; changed in place.
        own: the categories of this split.
    Returns:
        the split, and notes for the user.
    """
    if not categories:
        categories += own
        return split, []
    id_of = {entry["name"]: entry["id"] for entry in categories}
    name_of = {entry["id"]: entry["name"] for entry in categories}
    if all(name_of.get(entry["id"], entry["name"]) == entry["name"] for entry in own) and all(
        id_of.get(entry["name"], entry["id"]) == entry["id"] for entry in own
    ):
        # Two categories of one id or name in a single file stay two, so that the checks find them.
        categories += [entry for entry in own if entry["id"] not in name_of]
        return split, []
    new_id_of = {}
    for entry in own:
        if entry["name"] not in id_of:
            unused = entry["id"] if entry["id"] not in name_of else max(name_of) + 1
            id_of[entry["name"]], name_of[unused] = unused, entry["name"]
            categories.append(entry | {"id": unused})
        new_id_of[entry["id"]] = id_of[entry["name"]]
    used, inverse = np.unique(split.annotations.category_id, return_inverse=True)
    for category_id in set(used.tolist()) - new_id_of.keys():
        # No category of this split has that id. It must stay unknown and not become a class of another split.
        new_id_of[category_id] = category_id if category_id not in name_of else -1 - abs(category_id)
    new_ids = np.array([new_id_of[category_id] for category_id in used.tolist()], dtype=np.int64)[inverse]
    changed = {old: new for old, new in new_id_of.items() if old != new}
    note = f"{split.origin}: the class ids differ from the first split, so they were changed by name: {changed}."
    return split._replace(annotations=replace(split.annotations, category_id=new_ids)), [note]


def fill_sizes(split: RawSplit, replace_stated: bool = False) -> RawSplit:
    """Read width and height from the start of each image file if the annotations do not state them.

    Without sizes, corners cannot be distinguished from (x, y, width, height). Images that cannot be opened keep their
    entries: the check of image files reports them.

    Args:
        replace_stated: also replace the stated sizes.
    """
    unknown = [
        place
        for place, entry in enumerate(split.images)
        if replace_stated or None in (entry.get("width"), entry.get("height"))
    ]
    if not unknown:
        return split
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        sizes = pool.map(_size_in_file, [split.images[place] for place in unknown])
        found = dict(zip(unknown, sizes, strict=True))
    entries = [
        entry if found.get(place) is None else {**entry, "width": found[place][0], "height": found[place][1]}
        for place, entry in enumerate(split.images)
    ]
    return split._replace(images=entries)


def _size_in_file(entry: Mapping) -> tuple[int, int] | None:
    try:
        with open_image(entry) as image:
            return images.upright_size(image)
    except OSError:
        return None
