"""What the files of a data set say, unchecked, so that broken data can be looked at; all formats in the words of COCO."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from PIL import Image

from ..common import images

SPLITS = ("train", "validation", "test")


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
