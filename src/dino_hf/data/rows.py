"""What the files say -> rows in Arrow, for training and evaluation, checked on the way."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from ..common.images import read_image
from ..common.regular_files import is_regular
from .file_names import ambiguous_text
from .raw import MOST_PIXELS, Problem, RawSplit

SMALLEST_SIDE = 0.01  # in pixels; a box of less has no size, and image processors, in float32, would drop it


class _ImageFile(Image):
    """As in `datasets`, but the images are read as everywhere else in this package: upright, RGB, from local files only."""

    def decode_example(self, value, token_per_repo_id=None):
        if not isinstance(value, dict):  # it is decoded already
            return value
        path, content = value["path"], value["bytes"]
        try:
            if content is None and not path:
                raise OSError("It has neither bytes nor a path.")
            return read_image(path if content is None else content)
        except OSError as error:
            raise OSError(
                f"{path or 'An image'} cannot be read. {error} If it is damaged, copy it again, or take its entry and annotations "
                "out of the data."
            ) from error


_FEATURES = Features(
    {
        "image_id": Value("int64"),
        "image": _ImageFile(),
        "file_name": Value("string"),
        "width": Value("int64"),
        "height": Value("int64"),
        "objects": {
            "category": List(Value("int64")),
            "bbox": List(List(Value("float64"), length=4)),
            "area": List(Value("float64")),
            "iscrowd": List(Value("int64")),
        },
    }
)


class ImageSizeError(ValueError):
    """An image has another size than its annotations say."""


class CocoData(NamedTuple):
    """A data set and its class space."""

    # image_id, image, file_name as annotated, width and height (None where neither annotations nor file tell), objects: {category
    # (index), bbox (x, y, w, h) in pixels, area, iscrowd}
    dataset: Dataset
    id2label: dict[int, str]  # class index of the model, 0 to K - 1, -> name
    category_ids: list[int]  # class index -> original category id of the data, which may have gaps
    name: str | None = None  # in a model card

    def __repr__(self) -> str:
        return f"CocoData({self.name!r:.100}: {len(self.dataset)} images, {len(self.id2label)} classes)"


class ClassSpace(NamedTuple):
    id2label: dict[int, str]  # class index of the model, 0 to K - 1, -> name
    category_ids: list[int]  # class index -> original category id


def raise_problem(problems: list[Problem]) -> None:
    """The first one, as an error."""
    for problem in problems:
        kind = FileNotFoundError if problem.kind in ("missing-file", "missing-folder") else ValueError
        raise kind(problem.message)


def class_space(categories: list[dict], origin: Path | str) -> ClassSpace:
    """Categories in the order of their ids.

    Raises:
        ValueError: there are none, or two of one id or name.
    """
    names = {category_id: entry["name"] for category_id, entry in _by_id(categories, "category", origin).items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{origin} has categories of the same name: {sorted(names.values())}; names must differ.")
    if not names:
        raise ValueError(f"{origin} has no categories; each needs an id and a name.")
    category_ids = sorted(names)
    return ClassSpace({index: names[category_id] for index, category_id in enumerate(category_ids)}, category_ids)


def to_rows(split: RawSplit, classes: ClassSpace, name: str | None = None) -> tuple[CocoData, list[str]]:
    """One split in Arrow, and what the user should know about it. Embedded images stay where they are.

    A box that sticks out of its image is kept as it is; one of no size is left out, which a note says.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: what is wrong with an entry, and with which.
    """
    images = _by_id(split.images, "image", split.origin)
    if not images:
        raise ValueError(f"{split.origin} lists no images; add some, or leave this part out.")
    for image in images.values():
        if image.get("image") is None and not is_regular(image["path"]):
            raise FileNotFoundError(f"{missing_text(image, split.origin)}.")
    sizes = {image_id: _size(image, f"{split.origin}: image {image_id}") for image_id, image in images.items()}
    objects, notes = _objects(split, classes, sizes)
    columns = {
        "image_id": list(images),
        "file_name": [image["file_name"] for image in images.values()],
        "width": [width for width, _ in sizes.values()],
        "height": [height for _, height in sizes.values()],
        "objects": list(objects.values()),
    }
    if split.stored is None:
        columns["image"] = [str(image["path"]) for image in images.values()]
        dataset = Dataset.from_dict(columns, features=_FEATURES)
    else:
        rows = [image["image"].row for image in images.values()]
        stored = split.stored if rows == list(range(len(split.stored))) else split.stored.select(rows)
        others = Features({name: _FEATURES[name] for name in columns})
        dataset = concatenate_datasets([Dataset.from_dict(columns, features=others), stored], axis=1)
        dataset = dataset.cast_column("image", _ImageFile())
    return CocoData(dataset, *classes, name), notes


def missing_text(image: Mapping, origin: Path | str) -> str:
    """Why the file of an image is not there, without a full stop."""
    if not (candidates := image.get("candidates")):
        return f"{image['path']}, listed in {origin}, does not exist"
    return f"{image['file_name']}, listed in {origin}, {ambiguous_text(candidates)}"


def _objects(split: RawSplit, classes: ClassSpace, sizes: dict[int, tuple]) -> tuple[dict[int, dict], list[str]]:
    """Image id -> its objects as columns."""
    index_of = {category_id: index for index, category_id in enumerate(classes.category_ids)}
    objects = {image_id: {name: [] for name in _FEATURES["objects"]} for image_id in sizes}
    without_size = []
    for entry in split.annotations:
        where, box = f"{split.origin}: {entry['where']}", entry["bbox"]
        if entry["category_id"] not in index_of:
            raise ValueError(
                f"{where} has category_id={entry['category_id']}, but the categories are {classes.category_ids}."
            )
        if entry["image_id"] not in sizes:
            raise ValueError(f"{where} has image_id={entry['image_id']}, which is not among the images.")
        if not all(abs(value) < MOST_PIXELS for value in box):  # NaN neither
            raise ValueError(f"{where} has bbox={box}; it must be (x, y, width, height) in pixels.")
        area = entry.get("area")
        if area is not None and not 0 <= area < MOST_PIXELS**2:
            raise ValueError(f"{where} has area={area}; it must be a number of pixels, or be left out.")
        if not _has_size(box, sizes[entry["image_id"]], where):
            without_size.append(f"{entry['where']} with bbox={box}")
            continue
        of_image = objects[entry["image_id"]]
        of_image["category"].append(index_of[entry["category_id"]])
        of_image["bbox"].append(box)
        of_image["area"].append(box[2] * box[3] if area is None else area)
        of_image["iscrowd"].append(int(entry.get("iscrowd") or 0))
    if not without_size:
        return objects, []
    count = "1 box has no size and is" if len(without_size) == 1 else f"{len(without_size)} boxes have no size and are"
    note = f"{count} left out of training and evaluation; the first is {without_size[0]}."
    return objects, [f"{split.origin}, {split.name}: {note}"]


def _by_id(entries: list[dict], kind: str, origin: Path | str) -> dict[int, dict]:
    by_id = {}
    for entry in entries:
        if entry["id"] in by_id:
            raise ValueError(f"{origin} has two {kind} entries with id={entry['id']}; ids must differ.")
        by_id[entry["id"]] = entry
    return by_id


def _size(image: dict, where: str) -> tuple[int, int] | tuple[None, None]:
    """Width and height of an image, if the data have them."""
    size = image.get("width"), image.get("height")
    if None in size:
        return None, None
    if not all(isinstance(side, int | float) and 0 < side < MOST_PIXELS for side in size):
        raise ValueError(f"{where} has width={size[0]!r} and height={size[1]!r}; they must be numbers of pixels.")
    return int(size[0]), int(size[1])


def _has_size(box: list[float], image_size: tuple[int, int] | tuple[None, None], where: str) -> bool:
    """Whether there is something of a box in its image. Raises ValueError where there should be."""
    width, height = box[2:]
    if width < 0 or height < 0:
        raise ValueError(
            f"{where} has bbox={box}, of negative size; width and height must be positive. Of two corners, xmin must be below "
            "xmax, and ymin below ymax."
        )
    if min(width, height) < SMALLEST_SIDE:
        return False
    image_width, image_height = image_size if None not in image_size else (math.inf, math.inf)
    visible = visible_side(box, image_width, image_height)
    if visible <= 0:
        raise ValueError(
            f"{where} has bbox={box}, wholly outside of its image, which is {image_width} wide and {image_height} high; it must be "
            "(x, y, width, height) in pixels of the image as listed: scale it as the image was scaled, or remove it."
        )
    return visible >= SMALLEST_SIDE


def visible_side(box: list[float], image_width: float, image_height: float) -> float:
    """The shorter side of what is inside the image, at most 0 if nothing is."""
    x, y, width, height = box
    return min(min(x + width, image_width) - max(x, 0), min(y + height, image_height) - max(y, 0))


def check_image_size(image_id: int, image, size: tuple[int, int] | tuple[None, None]) -> None:
    """Raises ImageSizeError: annotations mean nothing on an image of another size than the json's."""
    if None in size or image.size == size:
        return
    if image.size == size[::-1]:
        cause = (
            "width and height are swapped in the json, or the file was turned after it was annotated: correct the json, or turn "
            "the boxes"
        )
    else:
        cause = "it was resized after it was annotated: bring width, height and boxes in the json to its size"
    raise ImageSizeError(
        f"Image {image_id} is {image.width} wide and {image.height} high, but {size[0]} and {size[1]} by its json; probably "
        f"{cause}."
    )
