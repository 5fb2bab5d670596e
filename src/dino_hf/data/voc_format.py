"""Read Pascal VOC data: an xml for each image."""

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ..common.images import IMAGE_SUFFIXES, open_image, upright_size
from ..common.regular_files import is_regular, read_bytes
from ..common.values import short_repr
from .file_names import SplitNames, canonical_split, is_generic, posix
from .files import DataFolder, only_usable
from .raw import SPLITS, AnnotationBuilder, Problem, RawDataset, RawSplit, in_order
from .split_lists import MISSING, SplitLists, image_set_lists, lists_beside

_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(source: Path, files: DataFolder) -> RawDataset | None:
    """Read a folder with xml files at any depth. None: no xml is an annotation.

    The folder may have VOC's layout (Annotations, JPEGImages, ImageSets/Main), or images beside the xml files or in a folder beside
    theirs. Splits come from lists (ImageSets, or files such as train.txt), else from folders.

    - Corners are read as today's tools write them: counted from 0, with xmax and ymax outside the box. If <database> names VOC
      itself, corners are counted from 1, with xmax and ymax inside the box. The box is then
      (xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1).
    - Objects marked `difficult` become crowds. They are not targets, and detections inside them are ignored in evaluation, as in
      VOC's evaluation.
    - Category ids are 1 to K in the alphabetical order of the names in all splits. Images are numbered from 1 in each split, in the
      order of their paths.
    """
    source = source.absolute()
    paths = list(files.files(source, {".xml"}))
    if not any(_is_annotation(path) for path in paths):
        return None
    problems, notes = [], []
    reader = _Reader(source, files, problems)
    names = SplitNames(source, paths)
    found: dict[str, list[_Annotated]] = {}
    for folder, lists, group in _by_lists(source, paths, files):
        splits_of, missing = lists.shares(files, folder, group) if lists else ({}, [])
        if lists and not splits_of:
            notes.append(f"{folder}: no line of {lists.where} names an xml, so these lists are ignored.")
            lists, missing = None, []
        unlisted = [path for path in group if lists and path not in splits_of]
        if unlisted:
            notes.append(f"{folder}: {len(unlisted)} xml files are in no list of {lists.where} and are skipped.")
        for path in group:
            splits_of_path = splits_of.get(path, []) if lists else [names.split_of_file(path) or _own_split(source)]
            if splits_of_path and (entry := reader.read(path)):
                for split in splits_of_path:
                    found.setdefault(split, []).append(entry)
        for split, line, why in missing:
            if why == MISSING:
                reader.read_unannotated(group[0].parent / f"{_stem(line)}.xml", split, lists.where, found)
                continue
            where = f"{folder}: {short_repr(line)}"
            message = f"{short_repr(line)}, listed as {split} data in {lists.where}, {why}."
            problems.append(Problem("missing-file", where, message))
    notes += [*names.notes(), *reader.images_without_xml(paths)]
    classes = {item.name for images in found.values() for image in images for item in image.objects}
    ids = {name: number for number, name in enumerate(sorted(classes), start=1)}
    splits = {split: _make_split(split, source, images, ids) for split, images in in_order(found).items()}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return only_usable(RawDataset("voc", source, splits, categories, problems, notes + files.notes()), files)


def why_no_voc(source: Path, files: DataFolder) -> str | None:
    """The reason why the xml files of a folder cannot be read. None: there is no xml file, or the first one is valid."""
    first = next(files.files(source, {".xml"}), None)
    if first is None:
        return None
    try:
        _parse(first)
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        return f"{first} is not valid xml: {error}; correct it, or save it as UTF-8."
    return None


def _parse(path: Path) -> ElementTree.Element:
    """Root of an xml file. Also reads encodings that Python's parser does not know, such as GBK."""
    content = read_bytes(path)
    try:
        return ElementTree.fromstring(content)
    except (ValueError, LookupError):
        declared = re.match(rb"""\s*<\?xml[^>]*encoding=["']([\w.-]+)["'][^>]*\?>""", content)
        if declared is None:
            raise
        return ElementTree.fromstring(content[declared.end() :].decode(declared[1].decode()))


def _is_annotation(path: Path) -> bool:
    try:
        return _parse(path).tag == "annotation"
    except (ElementTree.ParseError, ValueError, LookupError, OSError):  # LookupError: an unknown encoding
        return False


def _by_lists(source: Path, paths: list[Path], files: DataFolder) -> list[tuple[Path, SplitLists | None, list[Path]]]:
    """Groups of xml files as (folder, its split lists, files): files below the same ImageSets, and all others."""
    lists_in: dict[Path, SplitLists | None] = {}
    groups: dict[Path, list[Path]] = {}
    for path in paths:
        above = [folder for folder in path.parents if folder.is_relative_to(source)]
        for folder in above:
            if folder not in lists_in:
                lists_in[folder] = image_set_lists(folder, files)
        groups.setdefault(next((folder for folder in above if lists_in[folder]), source), []).append(path)
    return [(folder, lists_in[folder] or lists_beside(folder, files), group) for folder, group in groups.items()]


def _stem(line: str) -> str:
    """Name of an image in a line of a list, without suffix. A class mark (1, 0 or -1) or a second path may follow the name."""
    words = line.split()
    name = line if len(words) == 1 or (words[-1] not in ("0", "1", "-1") and "/" not in line) else words[0]
    return os.path.splitext(posix(name).rpartition("/")[2])[0]


def _own_split(source: Path) -> str:
    """The split if no folder inside names a split: the name of the data set's folder if it is exactly a split, else train."""
    name = canonical_split(source.absolute().name)
    return name if name in SPLITS else "train"


class _Object(NamedTuple):
    name: str
    box: list[float]  # x, y, width, height
    is_difficult: bool
    number: int  # in its xml


class _Annotated(NamedTuple):
    image: dict  # without its id
    where: str  # path of the xml in the data set
    objects: list[_Object]


class _Reader:
    """Reads xml files, and finds the image of each."""

    def __init__(self, source: Path, files: DataFolder, problems: list[Problem]):
        self.source, self.files, self.problems = source, files, problems
        self._names_in: dict[Path, dict[str, str]] = {}
        self._xml_of: dict[Path, Path] = {}  # image -> its xml

    def read(self, path: Path) -> _Annotated | None:
        """The content of one xml. None: it cannot be read, or is not an annotation."""
        try:
            root = _parse(path)
        except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
            self.problems.append(Problem("unreadable-file", str(path), f"{path} is not valid xml: {error}."))
            return None
        if root.tag != "annotation":
            return None
        first_pixel = 1 if re.match(r"The VOC\d* Database", root.findtext("source/database", "").strip()) else 0
        objects = []
        for number, entry in enumerate(root.iterfind("object")):
            try:
                objects.append(_read_object(entry, first_pixel, number))
            except ValueError as error:
                self.problems.append(
                    Problem("bad-entry", f"{path}, object {number}", f"{path}, object {number} {error}.")
                )
        return _Annotated(self._image(path, root), str(path.relative_to(self.source)), objects)

    def read_unannotated(self, path: Path, split: str, where: str, found: dict[str, list]) -> None:
        """Add an image that a list names and that has no xml, as is usual in test data. In other splits, it is a problem."""
        if split == "test":
            found.setdefault(split, []).append(_Annotated(self._image(path, None), "", []))
        else:
            message = f"{path} does not exist, but {where} lists it as {split} data."
            self.problems.append(Problem("missing-file", str(path), message))

    def images_without_xml(self, paths: list[Path]) -> list[str]:
        """A note, if folders with images have images without an xml."""
        known = {path.stem for path in [*paths, *self._xml_of]}
        folders = sorted({image.parent for image in self._xml_of})
        others = [
            folder / name for folder in folders for stem, name in self._images_in(folder).items() if stem not in known
        ]
        if not others:
            return []
        return [
            f"{len(others)} images have no xml and are skipped; the first is {others[0]}. An image without objects needs an xml "
            "without <object>."
        ]

    def _image(self, path: Path, root: ElementTree.Element | None) -> dict:
        listed = "" if root is None else root.findtext("filename", "").strip()
        image = self._find(path, Path(posix(listed)).name)
        if (
            self._xml_of.setdefault(image, path) != path
        ):  # cam1/1.xml and cam2/1.xml must not both mean the same file 1.jpg
            image = path.with_suffix(".jpg")
        size = [None if root is None else _whole(root.findtext(f"size/{side}")) for side in ("width", "height")]
        if None in size:  # some tools write 0 for an unknown size
            size = self._size_in_file(image)
        file_name = image.relative_to(self.source).as_posix() if image.is_relative_to(self.source) else image.name
        return {"file_name": file_name, "width": size[0], "height": size[1], "path": image}

    def _find(self, path: Path, listed: str) -> Path:
        """The image with the name of the xml, beside it or in a folder with images; else the image that <filename> names."""
        folders = self._image_folders(path.parent)
        for folder in folders:
            if Path(listed).stem == path.stem and is_regular(folder / listed):  # prefer it to a mask of the same name
                return folder / listed
            if name := self._images_in(folder).get(path.stem):
                return folder / name
        for folder in folders:
            if listed and is_regular(folder / listed):
                return folder / listed
        folder = next((folder for folder in folders[1:] if folder.is_dir()), path.parent)
        return folder / (listed or f"{path.stem}.jpg")

    @cache  # noqa: B019  a reader lives only while one data set is read
    def _image_folders(self, beside: Path) -> list[Path]:
        """Folders that may contain the images of the xml files in a folder, likely ones first.

        For annotations/train/a.xml: images/train, then images. For cam1/xml/a.xml: cam1/images, but never images, because it may
        contain images of another camera.
        """
        found = [beside]
        for above in [folder for folder in beside.parents if folder.is_relative_to(self.source)]:
            parts = beside.relative_to(above).parts
            own = [part for part in parts if not is_generic(part)] if len(parts) > 1 else []
            for below in (parts[1:], own):
                found += [above.joinpath(name, *below) for name in _IMAGE_FOLDERS]
            if not own:
                found.append(above)
        return [*dict.fromkeys([*found, *(beside / name for name in _IMAGE_FOLDERS)])]

    def _images_in(self, folder: Path) -> dict[str, str]:
        """Map stems to names of images in a folder. A photo goes before a mask such as a.png."""
        if folder not in self._names_in:
            names = os.listdir(folder) if folder.is_dir() else []
            images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
            images.sort(key=lambda name: (os.path.splitext(name)[1].lower() not in (".jpg", ".jpeg"), name))
            self._names_in[folder] = {
                os.path.splitext(name)[0]: name for name in reversed(images)
            }  # not the mask a.png
        return self._names_in[folder]

    def _size_in_file(self, path: Path) -> tuple[int, int] | tuple[None, None]:
        try:
            with open_image(path) as image:
                return upright_size(image)
        except OSError:  # a later check reports missing and damaged images for all formats
            return None, None


def _read_object(entry: ElementTree.Element, first_pixel: int, number: int) -> _Object:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    texts = [entry.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)
    except (TypeError, ValueError):
        found = {corner: text and text[:40] for corner, text in zip(_CORNERS, texts, strict=True)}
        raise ValueError(f"has {found} as bndbox; it must be four numbers") from None
    box = [x0 - first_pixel, y0 - first_pixel, x1 - x0 + first_pixel, y1 - y0 + first_pixel]
    return _Object(name, box, (entry.findtext("difficult") or "").strip() == "1", number)


def _whole(text: str | None) -> int | None:
    try:
        return round(float(text)) or None
    except (TypeError, ValueError, OverflowError):  # OverflowError: infinity
        return None


def _make_split(split: str, source: Path, entries: list[_Annotated], ids: dict[str, int]) -> RawSplit:
    images = [{"id": image_id, **entry.image} for image_id, entry in enumerate(entries, start=1)]
    annotations = AnnotationBuilder("{0}, object {1}", [entry.where for entry in entries])
    for place, entry in enumerate(entries):
        for item in entry.objects:
            annotations.add(place + 1, ids[item.name], item.box, item.number, place, iscrowd=item.is_difficult)
    return RawSplit(split, source, images, annotations.build())
