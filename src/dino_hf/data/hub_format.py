"""Read data sets of the library `datasets` with any usual names of columns."""

import os
from collections.abc import Iterator
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image
from huggingface_hub import constants

from ..common.images import upright_size
from ..common.values import short_repr
from .file_names import ImageFinder, canonical_split, posix
from .files import DataFolder, is_address, only_usable
from .hub_files import Part, load_datasets
from .hub_layout import box_fields, dtype_name, find_layout
from .raw import AnnotationBuilder, Problem, RawDataset, RawSplit, StoredImage, in_order, merge_categories, open_image

BOX_FORMATS = ("xywh", "xyxy", "cxcywh", "xywhn", "xyxyn", "cxcywhn")


def read_hub(source, box_format: str | None = None, allow_outside: bool = False) -> RawDataset:
    """Read a Hugging Face data set.

    A stream is first written to Arrow files in the cache of `datasets`. This needs disk space, but no memory. The files
    are removed when Python ends.

    Boxes and classes are searched for in `objects` (a dictionary of lists, or a list of dictionaries) and in separate columns
    with the usual names. Category ids come from a ClassLabel or from numbers in the data. Classes that are only strings are
    numbered 1 to K in alphabetical order over all splits. Image ids come from a column `image_id` if they are distinct integers,
    else 1 to N in each split.

    Args:
        source: a `Dataset`, `DatasetDict` or their iterable kinds; a folder of `save_to_disk`, of parquet, arrow or jsonl files, or
            of images with a metadata.jsonl; one of these files; or an id on the Hub.
        box_format: one of BOX_FORMATS. A final n means relative to the size of the image. Default: "xywh" in pixels, as in COCO.
            The layout is never guessed.
        allow_outside: read images outside the folder to which paths in the files lead. URLs are never opened.
    Raises:
        ValueError: no images or no boxes are found under known names.
        OSError: the data set does not exist here or on the Hub, or the Hub cannot be reached.
    """
    if box_format not in (None, *BOX_FORMATS):
        raise ValueError(f"box_format={box_format!r} is unknown; choose one of {', '.join(BOX_FORMATS)}.")
    files = None
    if isinstance(source, str | Path) and os.path.lexists(source):
        path = Path(source).absolute()
        files = DataFolder(path if path.is_dir() else path.parent, allow_outside=allow_outside)
    origin, parts, notes = load_datasets(source, files)
    if files is None and isinstance(source, str):  # a data set of the Hub has its files in these caches
        files = DataFolder(Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE))
    problems, read = [], []
    words, numbers = {}, {}
    for word, part in parts.items():
        name = canonical_split(word)
        if words.setdefault(name, word) != word:
            message = f"{origin} has {words[name]} and {word}, which both are {name} data; pass a DatasetDict with one of them."
            problems.append(Problem("two-files-for-a-split", f"{origin}, {word}", message))
            name = word
        reader = _Reader(f"{origin}, {word}", part, files, box_format, problems, numbers)
        read.append((*reader.read(name), reader.unnamed))
    ids = {name: number for number, name in enumerate(sorted(numbers), start=1)}
    id_of_number = np.array([0, *(ids[name] for name in numbers)])
    splits, categories = {}, []
    for split, own, unnamed in read:
        if own is None:
            own = [{"id": number, "name": name} for name, number in ids.items()]
            columns = split.annotations
            split = split._replace(annotations=replace(columns, category_id=id_of_number[columns.category_id]))
        split, own_notes = merge_categories(categories, split, own)
        splits[split.name] = split
        notes += own_notes
        if unnamed:
            notes.append(f"{split.origin}: the classes are numbers without names, so they are called class_<number>.")
    if box_format is None:
        notes.append(
            "Boxes are read as (x, y, width, height) in pixels; set box_format for another layout, such as xyxy."
        )
    raw = RawDataset("huggingface", origin, in_order(splits), categories, problems, list(dict.fromkeys(notes)))
    return only_usable(raw, files)


class _Reader:
    """Reads one split."""

    def __init__(
        self, where: str, part: Part, files: DataFolder | None, box_format: str | None, problems: list[Problem],
        numbers: dict[str, int],
    ):  # fmt: skip
        dataset = part.rows
        self.where, self.dataset, self.files, self.problems = where, dataset, files, problems
        self.layout, self.label = find_layout(dataset, where)
        self.box_fields, self.box_format = box_fields(dataset.features, self.layout, box_format, where)
        self.folder = part.beside
        self.numbers = numbers  # name of a class -> its number, from 1 in the order of appearance; shared by all splits
        self.unnamed = False

    def read(self, name: str) -> tuple[RawSplit, list[dict] | None]:
        """The split and its categories. None: classes are names, and category ids are their `numbers`."""
        images, stored = self._images(name)
        annotations, name_of = AnnotationBuilder("row {0}, object {1}", range(len(self.dataset))), {}
        group = self.layout.group
        needed = [group] if group else [column for column in self.layout[2:] if column]
        for row, objects in enumerate(self.dataset.select_columns(needed)):
            columns = _as_columns(objects[group] if group else objects)
            for number, entry in enumerate(self._objects(columns, f"row {row}")):
                if images[row].get("left_out") or not self._add(annotations, entry, images[row], row, number):
                    continue
                if self.layout.category_name and isinstance(entry[self.layout.category_name], str):
                    name_of.setdefault(entry[self.layout.category], entry[self.layout.category_name])
        images = [image for image in images if not image.pop("left_out", False)]
        split = RawSplit(name, self.where, images, annotations.build(), stored)
        if isinstance(self.label, ClassLabel):
            return split, [{"id": number, "name": name} for number, name in enumerate(self.label.names)]
        if "string" in dtype_name(self.label):
            return split, None
        self.unnamed = not name_of
        ids = np.unique(split.annotations.category_id).tolist()
        return split, [{"id": number, "name": name_of.get(number, f"class_{number}")} for number in ids]

    def _images(self, split: str) -> tuple[list[dict], Dataset | None]:
        features, column = self.dataset.features, self.layout.image
        ids = self._whole_numbers("image_id")
        if ids is None or None in ids or len(set(ids)) < len(ids):
            ids = list(range(1, len(self.dataset) + 1))
        widths, heights = (self._whole_numbers(side) or [None] * len(ids) for side in ("width", "height"))
        images = [
            {"id": image_id, "width": width or None, "height": height or None}
            for image_id, width, height in zip(ids, widths, heights, strict=True)
        ]
        if dtype_name(features[column]) == "string":
            return self._with_paths(images, [name or "" for name in self.dataset[column][:]], split), None
        stored = self.dataset.select_columns(column)
        stored = stored if column == "image" else stored.rename_column(column, "image")
        stored = stored.cast_column("image", Image(decode=False))
        left_out, names = set(), []
        for row, (path, has_bytes) in enumerate(_stored_paths(stored)):
            names.append(Path(posix(path)).name if path else None)
            if not path and not has_bytes:
                message = f"{self.where}: row {row} has no image, neither bytes nor a path."
                self.problems.append(Problem("missing-file", f"{self.where}: row {row}", message))
            elif not has_bytes and not self._may_be_opened(path, f"row {row}"):
                left_out.add(row)
        if dtype_name(features.get("file_name")) == "string":
            names = self.dataset["file_name"][:]
        for row, (entry, name) in enumerate(zip(images, names, strict=True)):
            entry["file_name"] = name or f"{row}"
            entry["image"] = StoredImage(stored, row)
            entry["left_out"] = row in left_out
        return images, stored

    def _may_be_opened(self, path: str, where: str) -> bool:
        """Whether the path of an image is a file of the data set. If not, add a problem."""
        if is_address(path):
            self._refuse_address(where, path)
        elif self.files is None or self.files.is_inside(Path(path).absolute()):
            return True
        else:
            message = f"{self.where}: {where}: {self.files.outside_text(path)}"
            self.problems.append(Problem("outside", f"{self.where}: {where}", message))
        return False

    def _with_paths(self, images: list[dict], names: list[str], split: str) -> list[dict]:
        """Add the paths of images from a column of paths, relative to the folder of the data or the working directory."""
        find, candidates = None, {}
        if self.files is not None and self.folder is not None:
            finder = ImageFinder(self.files, self.files.folder, names)
            find, candidates = finder.for_split(self.folder / "rows", split), finder.candidates
        for entry, name in zip(images, names, strict=True):
            entry["file_name"] = name
            if is_address(name):
                self._refuse_address(f"image {entry['id']}", name)
            entry["path"] = find(name) if find and name else Path(name).absolute()
            if entry["path"] in candidates:
                entry["candidates"] = candidates[entry["path"]]
        return images

    def _refuse_address(self, where: str, address: str) -> None:
        message = (
            f"{self.where}: {where} is at the address {short_repr(address)}, and URLs in data are never opened; "
            "download the image, "
            "and give its path or bytes."
        )
        self.problems.append(Problem("bad-entry", f"{self.where}: {where}", message))

    def _whole_numbers(self, column: str) -> list[int] | None:
        return self.dataset[column][:] if "int" in dtype_name(self.dataset.features.get(column)) else None

    def _objects(self, columns: dict[str, list], where: str) -> Iterator[dict]:
        fields = [field for field in self.layout[2:] if field]
        single = [name for name in (self.layout.box, self.layout.category) if not _is_list(columns.get(name))]
        if single:
            wrong = f"{single[0]}={columns[single[0]]!r}"
            message = f"{self.where}: {where} has {wrong}; it must be a list with one value for each object."
            self.problems.append(Problem("bad-entry", f"{self.where}: {where}", message))
            return
        lengths = {field: len(columns.get(field) or ()) for field in (self.layout.box, self.layout.category)}
        if len(set(lengths.values())) > 1:
            message = f"{self.where}: {where} has lists of different lengths: {lengths}; each box needs one class."
            self.problems.append(Problem("bad-entry", f"{self.where}: {where}", message))
            return
        for index in range(lengths[self.layout.box]):
            values = {field: columns.get(field) or () for field in fields}
            yield {field: listed[index] if index < len(listed) else None for field, listed in values.items()}

    def _add(self, annotations: AnnotationBuilder, entry: dict, image: dict, row: int, number: int) -> bool:
        """Add one object. False: it is a problem."""
        category_id, box = entry[self.layout.category], entry[self.layout.box]
        box = [box.get(field) for field in self.box_fields] if isinstance(box, dict) else box
        if not isinstance(category_id, Integral | str):
            wrong = f"has {self.layout.category}={category_id!r}; it must be a class"
        elif box is None or len(box) != 4 or not all(isinstance(value, Real) for value in box):
            wrong = f"has {self.layout.box}={short_repr(box)}; it must be four numbers"
        elif not all(entry[key] is None or isinstance(entry[key], Real) for key in self.layout[5:7] if key):
            values = {key: entry[key] for key in self.layout[5:7] if key}
            wrong = f"has {short_repr(values)}; they must be numbers"
        else:
            if isinstance(category_id, str):
                category_id = self.numbers.setdefault(category_id, len(self.numbers) + 1)
            others = (entry[key] if key else None for key in self.layout[5:])  # area, iscrowd, id
            annotations.add(image["id"], category_id, self._to_xywh(box, image), number, row, *others)
            return True
        where = f"row {row}, object {number}"
        self.problems.append(Problem("bad-entry", f"{self.where}: {where}", f"{self.where}: {where} {wrong}."))
        return False

    def _to_xywh(self, box: list[float], image: dict) -> list[float]:
        a, b, c, d = box
        if self.box_format.startswith("xyxy"):
            c, d = c - a, d - b
        elif self.box_format.startswith("cxcywh"):
            a, b = a - c / 2, b - d / 2
        if not self.box_format.endswith("n"):
            return [a, b, c, d]
        if image["width"] is None:
            with open_image(image) as opened:
                image["width"], image["height"] = upright_size(opened)
        return [a * image["width"], b * image["height"], c * image["width"], d * image["height"]]


def _is_list(column) -> bool:
    return column is None or isinstance(column, list | tuple)


def _as_columns(objects) -> dict[str, list]:
    """Objects as a dictionary of lists, from a dictionary of lists, a list of dictionaries, or None."""
    if not isinstance(objects, list):
        return objects or {}
    return {key: [entry[key] for entry in objects] for key in (objects[0] if objects else ())}


def _stored_paths(stored: Dataset) -> Iterator[tuple[str | None, bool]]:
    """For each row, the stored path and whether there are bytes. The bytes are not read."""
    for batch in stored.with_format("arrow").iter(batch_size=1000):
        paths, contents = (pc.struct_field(batch["image"], name) for name in ("path", "bytes"))
        yield from zip(paths.to_pylist(), contents.is_valid().to_pylist(), strict=True)
