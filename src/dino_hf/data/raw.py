"""What the files of a data set say, in columns, unchecked, so that broken data can be looked at. All formats use COCO's fields."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from ..common import images
from ..common.images import upright_size

SPLITS = ("train", "validation", "test")
MOST_PIXELS = 2**31  # of a side


class Problem(NamedTuple):
    """Something that could not even be read."""

    # "unreadable-file", "unreadable-image", "missing-file", "missing-folder", "missing-list", "bad-entry", "bad-line",
    # "two-files-for-a-split", "outside"
    kind: str
    where: str  # the file, and the entry or line in it
    message: str  # one sentence


class RawSplit(NamedTuple):
    """Images and annotations of one part of a data set, as the files have them.

    What a reader gives has the right types: an image has a whole `id` and a `file_name`, an annotation a whole `image_id` and
    `category_id` and four numbers as `bbox`. Entries that have not are among the problems. Nothing else is checked: sizes
    may be negative, numbers NaN, ids repeated or unknown.
    """

    name: str  # "train", "validation" or "test"; else the data's own word
    origin: Path | str  # json, folder or Hub id that it was read from, for messages
    # COCO's fields: id, file_name, width, height (None where the data do not tell), and `path` (absolute, may be missing) or
    # `image` (a mapping with bytes and path that reads them when asked); `candidates` of a missing path: files it may mean
    images: list[dict]
    # COCO's fields: id?, image_id, category_id, bbox (x, y, width, height) in pixels, area?, iscrowd?, and `where`, as in
    # "annotations[3]" or "labels/7.txt, line 3"
    annotations: list[dict]
    stored: Dataset | None = None  # column `image`, undecoded: where the `image`s of a Hugging Face data set are

    def __repr__(self) -> str:
        return f"RawSplit({self.name!r:.100}: {len(self.images)} images, {len(self.annotations)} annotations)"


class RawDataset(NamedTuple):
    """All parts of a data set."""

    format: str  # "coco", "yolo", "voc", "huggingface"
    origin: Path | str
    splits: dict[str, RawSplit]
    categories: list[dict]  # of all splits: id, name, supercategory?; ids as in the first split that has the class
    problems: list[Problem]
    notes: list[str] = []  # noqa: RUF012  what was decided in reading; never changed

    def __repr__(self) -> str:
        splits = ", ".join(f"{name:.100} {len(one.images)} images" for name, one in list(self.splits.items())[:10])
        return (
            f"RawDataset({str(self.origin)!r:.100}, {self.format}: {splits}; {len(self.categories)} categories, "
            f"{len(self.problems)} problems)"
        )


class StoredImage(Mapping):
    """{"bytes", "path"} of one row, read when asked for: the images of a data set would not fit in memory."""

    __slots__ = ("dataset", "row")

    def __init__(self, dataset: Dataset, row: int):
        self.dataset, self.row = dataset, row

    def __getitem__(self, key: str):
        return (self.dataset[self.row]["image"] or dict.fromkeys(self))[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("bytes", "path"))

    def __len__(self) -> int:
        return 2


def open_image(entry: dict) -> Image.Image:
    """The image of an entry of `RawSplit.images`, opened but not decoded, not turned by its EXIF orientation.

    Raises:
        OSError: it is missing, or is no image that can be read.
    """
    return images.open_image(image_file(entry))


def image_file(entry: Mapping) -> Path | str | bytes:
    """Where an entry of `RawSplit.images` has its image: a file, or the bytes of one.

    Raises:
        FileNotFoundError: it has neither.
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
    """Train, validation, test, others."""
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS)))


_TOO_LARGE = 1e100  # for a number: products of smaller ones are finite


class BoxTable(NamedTuple):
    """Annotations of a split in their order; N of them."""

    boxes: (
        np.ndarray
    )  # (N, 4) float64 as in the files; not a number where they are not four numbers that training takes
    image: np.ndarray  # (N,) place of the image in split.images; -1 if there is none of that id
    category: np.ndarray  # (N,) place in the categories; -1 if there is none of that id
    is_crowd: np.ndarray  # (N,) bool
    area: np.ndarray  # (N,) as in the files; not a number where they have none
    sizes: np.ndarray  # (N, 2) width and height of the image as stated; not a number where unknown

    @property
    def is_number(self) -> np.ndarray:
        """(N,)"""
        return np.isfinite(self.boxes).all(1)

    @property
    def corners(self) -> np.ndarray:
        """(N, 4) x0, y0, x1, y1, if the files mean (x, y, width, height) in pixels."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)


def make_box_table(split: RawSplit, categories: Sequence[dict], image_sizes: np.ndarray | None = None) -> BoxTable:
    """Whatever an annotation lacks or has of a wrong type becomes "not a number" or "none of that id".

    Args:
        image_sizes: (I, 2) width and height that the boxes are for; as stated in the files if not given.
    """
    annotations = split.annotations
    image = _places([entry.get("image_id") for entry in annotations], [entry.get("id") for entry in split.images])
    category = _places([entry.get("category_id") for entry in annotations], [entry.get("id") for entry in categories])
    if image_sizes is None:
        image_sizes = stated_sizes(split)
    sizes = np.full((len(annotations), 2), np.nan)
    sizes[image >= 0] = image_sizes[image[image >= 0]]
    return BoxTable(
        boxes=_boxes([entry.get("bbox") for entry in annotations]),
        image=image,
        category=category,
        is_crowd=np.array([bool(entry.get("iscrowd")) for entry in annotations], dtype=bool),
        area=_numbers([entry.get("area") for entry in annotations]),
        sizes=sizes,
    )


def stated_sizes(split: RawSplit) -> np.ndarray:
    """(I, 2) width and height; not a number where the data do not tell or tell nonsense."""
    sizes = [(image.get("width"), image.get("height")) for image in split.images]
    known = [size if all(_is_number(side) and side > 0 for side in size) else (math.nan, math.nan) for size in sizes]
    return np.array(known, dtype=np.float64).reshape(-1, 2)


def count_boxes(table: BoxTable, num_images: int) -> np.ndarray:
    """(I,) annotations of each image."""
    return np.bincount(table.image[table.image >= 0], minlength=num_images)


def _is_number(value) -> bool:
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        return False
    return abs(value) < _TOO_LARGE  # compares whole numbers that no float holds, and is False for NaN


def _places(ids: list, known: list) -> np.ndarray:
    """(len(ids),) where each id stands among the known ones, at its first place; -1 if nowhere."""
    place_of = {}
    for place, value in enumerate(known):
        if value is not None and isinstance(value, int | str | np.integer):
            place_of.setdefault(value, place)
    try:
        return np.fromiter((place_of.get(value, -1) for value in ids), dtype=np.int64, count=len(ids))
    except TypeError:  # a list or dictionary where an id should be
        ids = [value if isinstance(value, int | str | np.integer) else None for value in ids]
        return np.fromiter((place_of.get(value, -1) for value in ids), dtype=np.int64, count=len(ids))


def _boxes(values: list) -> np.ndarray:
    """(len(values), 4)"""
    try:
        boxes = np.array(values)  # fast, and right for data that are not broken
    except ValueError:
        boxes = None
    if boxes is None or boxes.dtype.kind not in "iuf" or boxes.shape != (len(values), 4):
        rows = [np.ravel(value).tolist() if isinstance(value, np.ndarray) else value for value in values]
        is_box = [isinstance(row, list | tuple) and len(row) == 4 and all(map(_is_number, row)) for row in rows]
        boxes = np.array([row if good else [math.nan] * 4 for row, good in zip(rows, is_box, strict=True)])
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    boxes[~(np.abs(boxes) < MOST_PIXELS).all(1)] = np.nan
    return boxes


def _numbers(values: list) -> np.ndarray:
    """(len(values),) not a number for None; -inf for what is neither a finite number nor None."""
    numbers = [math.nan if value is None else value if _is_number(value) else -math.inf for value in values]
    return np.array(numbers, dtype=np.float64)


def groups_of_others(categories: Sequence[dict]) -> list[bool]:
    """Whether each category is the supercategory of another one, which may have the same name as in exports of one class."""
    entries_of: dict[str, set[int]] = {}
    for place, entry in enumerate(categories):
        if isinstance(entry.get("supercategory"), str):
            entries_of.setdefault(entry["supercategory"], set()).add(place)
    return [bool(entries_of.get(entry.get("name"), set()) - {place}) for place, entry in enumerate(categories)]


def merge_categories(categories: list[dict], split: RawSplit, own: list[dict]) -> tuple[RawSplit, list[str]]:
    """Add a split's categories to those of the splits before it. Where its ids mean other classes, as in parts that were
    numbered one by one, its annotations get the ids that the first split has for their names."""
    if not categories:
        categories += own
        return split, []
    id_of = {entry["name"]: entry["id"] for entry in categories}
    name_of = {entry["id"]: entry["name"] for entry in categories}
    if all(name_of.get(entry["id"], entry["name"]) == entry["name"] for entry in own) and all(
        id_of.get(entry["name"], entry["id"]) == entry["id"] for entry in own
    ):
        # two of one id or name in a single file stay two, to be found
        categories += [entry for entry in own if entry["id"] not in name_of]
        return split, []
    new_id_of = {}
    for entry in own:
        if entry["name"] not in id_of:
            unused = entry["id"] if entry["id"] not in name_of else max(name_of) + 1
            id_of[entry["name"]], name_of[unused] = unused, entry["name"]
            categories.append(entry | {"id": unused})
        new_id_of[entry["id"]] = id_of[entry["name"]]
    for category_id in {entry["category_id"] for entry in split.annotations} - new_id_of.keys():
        # Nothing in this split has that id, so nothing may in the others: it must be found, not be another class.
        new_id_of[category_id] = category_id if category_id not in name_of else -1 - abs(category_id)
    annotations = [entry | {"category_id": new_id_of[entry["category_id"]]} for entry in split.annotations]
    changed = {old: new for old, new in new_id_of.items() if old != new}
    note = f"{split.origin}: the classes are numbered otherwise than in the first split; ids were changed by name: {changed}."
    return split._replace(annotations=annotations), [note]


def fill_sizes(split: RawSplit, replace: bool = False) -> RawSplit:
    """Read width and height from the start of each image file where the annotations have none.

    Images that cannot be opened keep what they have: the check of image files names them.

    Args:
        replace: also read them where the annotations have them.
    """
    unknown = [
        place
        for place, entry in enumerate(split.images)
        if replace or None in (entry.get("width"), entry.get("height"))
    ]
    if not unknown:
        return split
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        sizes = pool.map(_size, [split.images[place] for place in unknown])
        found = dict(zip(unknown, sizes, strict=True))
    images = [
        entry if found.get(place) is None else {**entry, "width": found[place][0], "height": found[place][1]}
        for place, entry in enumerate(split.images)
    ]
    return split._replace(images=images)


def _size(entry: Mapping) -> tuple[int, int] | None:
    try:
        with open_image(entry) as image:
            return upright_size(image)
    except OSError:
        return None
