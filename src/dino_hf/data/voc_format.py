"""Pascal VOC: an xml for each image."""

import os
import re
from pathlib import Path
from xml.etree import ElementTree

from ..common.images import IMAGE_SUFFIXES, open_image, upright_size
from .files import files_below, read_lines
from .raw import SPLITS, Problem, RawDataset, RawSplit, canonical_split, in_order, split_in

_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(source: Path) -> RawDataset | None:
    """A folder with xml files: VOC's own (Annotations, JPEGImages, ImageSets/Main), or with images beside them or in a folder
    beside theirs, in folders of splits or not. None if no xml is an annotation.

    Corners are taken as today's tools write them: from 0, the last one outside of the box. Where <database> names VOC itself
    they are counted from 1, the last pixel inside, and become (xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1).
    Objects marked `difficult`, which VOC's evaluation neither demands nor counts as wrong, become crowds: they are not
    trained on, and detections inside of them are ignored in evaluation.
    VOC has no category ids: they are 1 to K in the order of the names of all splits. Images are numbered from 1 in each split,
    in the order of their paths.
    """
    files = list(files_below(source, {".xml"}))
    if not any(map(_is_annotation, files)):
        return None
    problems, notes = [], []
    reader = _Reader(source, problems)
    image_sets = {folder: _image_sets(folder) for folder in {path.parent for path in files}}
    found: dict[str, list[tuple[dict, list[dict]]]] = {}
    unlisted = 0
    for path in files:
        sets = image_sets[path.parent]
        told = [_split_word(source, path)] if sets is None else sets.pop(path.stem, [])
        unlisted += not told
        if told and (entry := reader.read(path)):
            for split in told:
                found.setdefault(split, []).append(entry)
    if unlisted:
        notes.append(f"{source}: {unlisted} xml files are in no list of ImageSets/Main and are passed over.")
    for folder, sets in image_sets.items():
        for stem, told in (sets or {}).items():
            reader.read_unannotated(folder / f"{stem}.xml", told, found)
    names = {entry["category_id"] for images in found.values() for _, objects in images for entry in objects}
    ids = {name: number for number, name in enumerate(sorted(names), start=1)}
    splits = {split: _number(split, source, images, ids) for split, images in in_order(found).items()}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return RawDataset("voc", source, splits, categories, problems, notes)


def _is_annotation(path: Path) -> bool:
    try:
        return ElementTree.parse(path).getroot().tag == "annotation"
    except (ElementTree.ParseError, ValueError, LookupError):  # the last two: of an encoding that is wrong or unknown
        return False


def _image_sets(folder: Path) -> dict[str, list[str]] | None:
    """Stem of an image -> the splits that list it, if there are lists beside a folder of annotations."""
    lists = folder.parent / "ImageSets" / "Main"
    files = {word: lists / f"{word}.txt" for word in ("train", "val", "test") if (lists / f"{word}.txt").is_file()}
    if not {"train", "val"} & set(files) and (lists / "trainval.txt").is_file():
        files["trainval"] = lists / "trainval.txt"
    if not files:
        return None
    stems = {path.stem for path in folder.iterdir()}
    splits: dict[str, list[str]] = {}
    for word, path in files.items():
        for line in read_lines(path):
            stem = line if line in stems else line.split()[0]  # lists of one class have 1 or -1 behind the name
            splits.setdefault(stem, []).append(canonical_split(word))
    return splits


def _split_word(source: Path, path: Path) -> str:
    """The nearest folder's that tells one."""
    for folder in path.relative_to(source).parts[-2::-1]:
        if split := split_in(folder):
            return split
    name = canonical_split(source.absolute().name)
    return name if name in SPLITS else "train"


class _Reader:
    """Reads xml files, and finds the image of each."""

    def __init__(self, source: Path, problems: list[Problem]):
        self.source = source.absolute()
        self.problems = problems
        self._names_in: dict[Path, dict[str, str]] = {}

    def read(self, path: Path) -> tuple[dict, list[dict]] | None:
        """The image without its id, and its objects without image ids, category ids being names yet."""
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            self.problems.append(Problem("unreadable-file", str(path), f"{path} is not valid xml: {error}."))
            return None
        if root.tag != "annotation":
            return None
        first_pixel = 1 if re.match(r"The VOC\d* Database", root.findtext("source/database", "").strip()) else 0
        where = path.relative_to(self.source) if path.is_absolute() else path.absolute().relative_to(self.source)
        objects = []
        for number, entry in enumerate(root.iterfind("object")):
            try:
                objects.append(_read_object(entry, first_pixel) | {"where": f"{where}, object {number}"})
            except ValueError as error:
                self.problems.append(
                    Problem("bad-entry", f"{path}, object {number}", f"{path}, object {number} {error}.")
                )
        return self._image(path, root), objects

    def read_unannotated(self, path: Path, splits: list[str], found: dict[str, list]) -> None:
        """An image that a list names and that has no xml: usual in test data."""
        for split in splits:
            if split == "test":
                found.setdefault(split, []).append((self._image(path, None), []))
            else:
                message = f"{path} does not exist, but ImageSets/Main lists it as {split} data."
                self.problems.append(Problem("missing-file", str(path), message))

    def _image(self, path: Path, root: ElementTree.Element | None) -> dict:
        listed = "" if root is None else root.findtext("filename", "").strip()
        image = self._find(path.absolute(), Path(listed.replace("\\", "/")).name)
        size = [None if root is None else _whole(root.findtext(f"size/{side}")) for side in ("width", "height")]
        if None in size:  # some tools write 0 for what they do not know
            size = self._size_in_file(image)
        file_name = image.relative_to(self.source).as_posix() if image.is_relative_to(self.source) else image.name
        return {"file_name": file_name, "width": size[0], "height": size[1], "path": image}

    def _find(self, path: Path, listed: str) -> Path:
        """The image called as the xml is, beside it or in a folder for images; else as <filename> says."""
        above, below = path.parent.parent, path.parent.relative_to(self.source).parts[1:]
        folders = [
            path.parent,
            *(above / name for name in _IMAGE_FOLDERS),
            *(self.source.joinpath(name, *below) for name in _IMAGE_FOLDERS),  # images/train for annotations/train
            path.parent / "images",
            above,
        ]
        for folder in folders:
            if Path(listed).stem == path.stem and (folder / listed).is_file():  # of two, not the mask beside it
                return folder / listed
            if name := self._images_in(folder).get(path.stem):
                return folder / name
        for folder in folders:
            if listed and (folder / listed).is_file():
                return folder / listed
        folder = next((folder for folder in folders[1:-1] if folder.is_dir()), path.parent)
        return folder / (listed or f"{path.stem}.jpg")

    def _images_in(self, folder: Path) -> dict[str, str]:
        """Stem -> name."""
        if folder not in self._names_in:
            names = os.listdir(folder) if folder.is_dir() else []
            images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
            self._names_in[folder] = {os.path.splitext(name)[0]: name for name in sorted(images)}
        return self._names_in[folder]

    def _size_in_file(self, path: Path) -> tuple[int, int] | tuple[None, None]:
        try:
            with open_image(path) as image:
                return upright_size(image)
        except OSError:  # missing or damaged: both are found with the images of all formats
            return None, None


def _read_object(entry: ElementTree.Element, first_pixel: int) -> dict:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    texts = [entry.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)
    except (TypeError, ValueError):
        raise ValueError(f"has {dict(zip(_CORNERS, texts, strict=True))} as bndbox; it must be four numbers") from None
    box = [x0 - first_pixel, y0 - first_pixel, x1 - x0 + first_pixel, y1 - y0 + first_pixel]
    return {"category_id": name, "bbox": box, "iscrowd": int((entry.findtext("difficult") or "").strip() == "1")}


def _whole(text: str | None) -> int | None:
    try:
        return round(float(text)) or None
    except (TypeError, ValueError):
        return None


def _number(split: str, source: Path, entries: list[tuple[dict, list[dict]]], ids: dict[str, int]) -> RawSplit:
    images, annotations = [], []
    for image_id, (image, objects) in enumerate(entries, start=1):
        images.append({"id": image_id, **image})
        annotations += [{**entry, "image_id": image_id, "category_id": ids[entry["category_id"]]} for entry in objects]
    return RawSplit(split, source, images, annotations)
