"""Check a split of raw data and write it as Arrow columns for training and evaluation."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Image, List, Value, concatenate_datasets

from ..common.images import read_image
from ..common.regular_files import is_regular
from .file_names import ambiguous_text
from .raw import MOST_PIXELS, Annotations, BoxTable, Problem, RawSplit, area_text, make_box_table, number_text

SMALLEST_SIDE = 0.01  # in pixels; a smaller box has no size: image processors use float32 and would drop it


class _ImageFile(Image):
    """Like `datasets.Image`, but images are read with `common.images`: upright, RGB, from local files only."""

    def decode_example(self, value, token_per_repo_id=None):
        if not isinstance(value, dict):  # already decoded
            return value
        path, content = value["path"], value["bytes"]
        try:
            if content is None and not path:
                raise OSError("It has neither bytes nor a path.")
            return read_image(path if content is None else content)
        except OSError as error:
            raise OSError(
                f"{path or 'An image'} cannot be read. {error} If it is damaged, copy it again, or remove its entry and "
                "annotations from the data."
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
    """An image has a different size than its annotations state."""


class CocoData(NamedTuple):
    """A data set in Arrow form and its classes."""

    # image_id, image, file_name as annotated, width and height (None if unknown), objects: {category (class index), bbox (x, y, w,
    # h) in pixels, area, iscrowd}
    dataset: Dataset
    id2label: dict[int, str]  # class index of the model, 0 to K - 1, -> name
    category_ids: list[int]  # class index -> original category id of the data, which may have gaps
    name: str | None = None  # name in a model card

    def __repr__(self) -> str:
        return f"CocoData({self.name!r:.100}: {len(self.dataset)} images, {len(self.id2label)} classes)"


def box_columns(data: CocoData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, crowd flag and place of the image in the data set of each box, three arrays (N,)."""
    columns = data.dataset.select_columns("objects").with_format("arrow")[:]["objects"].combine_chunks()
    crowds, categories = columns.field("iscrowd"), columns.field("category")
    counts = np.diff(crowds.offsets.to_numpy(zero_copy_only=False))
    is_crowd = crowds.flatten().to_numpy(zero_copy_only=False).astype(bool)
    image = np.repeat(np.arange(len(counts)), counts)
    return categories.flatten().to_numpy(zero_copy_only=False).astype(np.int64), is_crowd, image


class ClassSpace(NamedTuple):
    id2label: dict[int, str]  # class index of the model, 0 to K - 1, -> name
    category_ids: list[int]  # class index -> original category id


def replace_boxes(data: CocoData, classes: ClassSpace, objects: Mapping[int, Mapping[str, list]]) -> CocoData:
    """The same images with other boxes and classes. Embedded images are not copied.

    Args:
        objects: image id -> objects, as in a row of a `CocoData`. Categories are indices of `classes`.
    """
    # Replace the column in the whole table below a selection of rows: `add_column` would copy the selected images.
    table, features = data.dataset.data.table, data.dataset.features
    ids = table["image_id"].to_pylist()
    empty = {name: [] for name in features["objects"]}
    column = [objects.get(image_id, empty) for image_id in ids]
    place, objects_type = table.column_names.index("objects"), Features({"objects": features["objects"]})
    column = pa.table({"objects": column}, schema=objects_type.arrow_schema)["objects"]
    dataset = Dataset(table.set_column(place, "objects", column), info=DatasetInfo(features=features))
    rows = dict(zip(ids, range(len(ids)), strict=True))
    selected = [rows[image_id] for image_id in data.dataset.select_columns("image_id")[:]["image_id"]]
    if selected != list(range(len(ids))):
        dataset = dataset.select(selected)
    return CocoData(dataset, *classes, data.name)


def raise_problem(problems: list[Problem]) -> None:
    """Raise the first problem as an error."""
    for problem in problems:
        kind = FileNotFoundError if problem.kind in ("missing-file", "missing-folder") else ValueError
        raise kind(problem.message)


def class_space(categories: list[dict], origin: Path | str) -> ClassSpace:
    """Number categories 0 to K - 1 in the order of their ids.

    Raises:
        ValueError: there are no categories, or two have the same id or name.
    """
    _check_ids([entry["id"] for entry in categories], "category", origin)
    names = {entry["id"]: entry["name"] for entry in categories}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{origin} has categories of the same name: {sorted(names.values())}; names must differ.")
    if not names:
        raise ValueError(f"{origin} has no categories; each needs an id and a name.")
    category_ids = sorted(names)
    return ClassSpace({index: names[category_id] for index, category_id in enumerate(category_ids)}, category_ids)


def to_rows(split: RawSplit, classes: ClassSpace, name: str | None = None) -> tuple[CocoData, list[str]]:
    """Check one split and write it as Arrow columns. Embedded images are not copied.

    A box that sticks out of its image is kept as it is. A box without size is left out, with a note.

    Returns:
        the data, and notes for the user.
    Raises:
        FileNotFoundError: an image is missing.
        ValueError: an entry is wrong. The message names the first wrong entry.
    """
    images = split.images
    _check_ids([image["id"] for image in images], "image", split.origin)
    if not images:
        raise ValueError(f"{split.origin} lists no images; add some, or leave this part out.")
    for image in images:
        if image.get("image") is None and not is_regular(image["path"]):
            raise FileNotFoundError(f"{missing_text(image, split.origin)}.")
    sizes = [_size(image, f"{split.origin}: image {image['id']}") for image in images]
    objects, notes = _objects(split, classes, sizes)
    columns = {
        "image_id": pa.array([image["id"] for image in images], pa.int64()),
        "file_name": pa.array([image["file_name"] for image in images], pa.string()),
        "width": pa.array([width for width, _ in sizes], pa.int64()),
        "height": pa.array([height for _, height in sizes], pa.int64()),
        "objects": objects,
    }
    if split.stored is None:
        paths = pa.array([str(image["path"]) for image in images], pa.string())
        columns["image"] = pa.StructArray.from_arrays([pa.nulls(len(images), pa.binary()), paths], ["bytes", "path"])
    features = Features({column: feature for column, feature in _FEATURES.items() if column in columns})
    table = pa.table({column: columns[column] for column in features}).cast(features.arrow_schema)
    dataset = Dataset(table, info=DatasetInfo(features=features))
    if split.stored is not None:
        rows = [image["image"].row for image in images]
        stored = split.stored if rows == list(range(len(split.stored))) else split.stored.select(rows)
        dataset = concatenate_datasets([dataset, stored], axis=1).cast_column("image", _ImageFile())
    return CocoData(dataset, *classes, name), notes


def missing_text(image: Mapping, origin: Path | str) -> str:
    """Text about an image whose file is missing, without a full stop."""
    if not (candidates := image.get("candidates")):
        return f"{image['path']}, listed in {origin}, does not exist"
    return f"{image['file_name']}, listed in {origin}, {ambiguous_text(candidates)}"


def _objects(split: RawSplit, classes: ClassSpace, sizes: list[tuple]) -> tuple[pa.StructArray, list[str]]:
    """The column `objects`, and notes for the user."""
    annotations = split.annotations
    table = make_box_table(split, [{"id": category_id} for category_id in classes.category_ids], _as_floats(sizes))
    has_size = _check_boxes(split, table, classes)
    order = _box_order(table, has_size)
    areas = np.where(np.isnan(annotations.area), table.boxes[:, 2] * table.boxes[:, 3], annotations.area)
    ends = np.bincount(table.image[order], minlength=len(sizes)).cumsum()  # (I,)
    offsets = pa.array(np.append(0, ends).astype(np.int32))
    columns = {
        "category": pa.array(table.category),
        "bbox": pa.FixedSizeListArray.from_arrays(table.boxes.ravel(), 4),
        "area": pa.array(areas),
        "iscrowd": pa.array(annotations.iscrowd.astype(np.int64)),
    }
    lists = [pa.ListArray.from_arrays(offsets, values.take(pa.array(order))) for values in columns.values()]
    objects = pa.StructArray.from_arrays(lists, list(columns))
    left_out = np.flatnonzero(~has_size)
    if not len(left_out):
        return objects, []
    count = "1 box has no size and is" if len(left_out) == 1 else f"{len(left_out)} boxes have no size and are"
    first = f"{annotations.where(left_out[0])} with bbox={_box_text(annotations.bbox[left_out[0]])}"
    note = f"{count} left out of training and evaluation; the first is {first}."
    return objects, [f"{split.origin}, {split.name}: {note}"]


def _box_order(table: BoxTable, has_size: np.ndarray) -> np.ndarray:
    """The places of the kept boxes in the annotations, in the order of the images."""
    order = np.argsort(table.image, kind="stable")
    return order[has_size[order]]


def annotation_names(split: RawSplit, classes: ClassSpace) -> list:
    """The id of each box of the rows that `to_rows` makes; without ids, its place in the files.

    Args:
        split: with the sizes of its images, as for `to_rows`.
    """
    sizes = _as_floats([_size(image, "an image") for image in split.images])
    table = make_box_table(split, [{"id": category_id} for category_id in classes.category_ids], sizes)
    order = _box_order(table, _check_boxes(split, table, classes))
    ids = split.annotations.id
    return [split.annotations.where(place) if ids[place] is None else ids[place] for place in order.tolist()]


def _as_floats(sizes: list[tuple]) -> np.ndarray:
    """(I, 2) sizes, NaN if unknown."""
    return np.array([(math.nan, math.nan) if None in size else size for size in sizes], dtype=np.float64)


def _check_boxes(split: RawSplit, table: BoxTable, classes: ClassSpace) -> np.ndarray:
    """(N,) whether a box has a size inside its image.

    Raises:
        ValueError: an annotation is wrong. The message names the first wrong annotation.
    """
    area = split.annotations.area
    sizes = np.where(np.isnan(table.sizes), np.inf, table.sizes)
    with np.errstate(invalid="ignore"):  # boxes that are not numbers
        shorter = table.boxes[:, 2:].min(1)
        corners = table.corners
        visible = (np.minimum(corners[:, 2:], sizes) - np.maximum(corners[:, :2], 0)).min(1)
        wrong = {
            "category": table.category < 0,
            "image": table.image < 0,
            "box": ~table.is_number,
            "area": (area < 0) | (area >= MOST_PIXELS**2),
            "negative": shorter < 0,
            "outside": (shorter >= SMALLEST_SIDE) & (visible <= 0),
        }
    is_wrong = np.any(list(wrong.values()), axis=0)
    if is_wrong.any():
        place = int(is_wrong.argmax())
        kind = next(kind for kind, mask in wrong.items() if mask[place])
        text = _wrong_text(kind, split.annotations, place, classes, sizes[place])
        raise ValueError(f"{split.origin}: {split.annotations.where(place)} has {text}")
    return (shorter >= SMALLEST_SIDE) & (visible >= SMALLEST_SIDE)


def _wrong_text(kind: str, annotations: Annotations, place: int, classes: ClassSpace, size: np.ndarray) -> str:
    box, area = f"bbox={_box_text(annotations.bbox[place])}", annotations.area[place]
    return {
        "category": f"category_id={annotations.category_id[place]}, but the categories are {classes.category_ids}.",
        "image": f"image_id={annotations.image_id[place]}, which is not among the images.",
        "box": f"{box}; it must be (x, y, width, height) in pixels.",
        "area": f"area={area_text(area)}; it must be a number of pixels, or be left out.",
        "negative": f"{box}, of negative size; width and height must be positive. In a box of two corners, xmin must be below "
        "xmax, and ymin below ymax.",
        "outside": f"{box}, which is completely outside of its image of {size[0]:g} x {size[1]:g} pixels (width x height); it "
        "must be (x, y, width, height) in pixels of the listed size. If the image was resized, scale the box too, or remove it.",
    }[kind]


def _box_text(box: np.ndarray) -> str:
    return f"[{', '.join(map(number_text, box))}]"


def _check_ids(ids: Sequence[int], kind: str, origin: Path | str) -> None:
    """Raises ValueError if two entries have the same id."""
    if len(set(ids)) == len(ids):
        return
    repeated = next(one for one, count in Counter(ids).items() if count > 1)
    raise ValueError(f"{origin} has two {kind} entries with id={repeated}; ids must differ.")


def _size(image: dict, where: str) -> tuple[int, int] | tuple[None, None]:
    """Stated width and height of an image. (None, None): not stated. Raises ValueError if they are not positive numbers."""
    size = image.get("width"), image.get("height")
    if None in size:
        return None, None
    if not all(isinstance(side, int | float) and 0 < side < MOST_PIXELS for side in size):
        raise ValueError(f"{where} has width={size[0]!r} and height={size[1]!r}; they must be numbers of pixels.")
    return int(size[0]), int(size[1])


def visible_side(box: list[float], image_width: float, image_height: float) -> float:
    """Shorter side of the part of a box inside its image. 0 or negative: no part is inside."""
    x, y, width, height = box
    return min(min(x + width, image_width) - max(x, 0), min(y + height, image_height) - max(y, 0))


def check_image_size(image_id: int | str, image, size: tuple[int, int] | tuple[None, None]) -> None:
    """Raise ImageSizeError if an image has a different size than stated, because then its boxes are wrong."""
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
