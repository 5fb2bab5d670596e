"""Read COCO json files and find their images."""

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ..common import regular_files
from ..common.values import short_repr
from .file_names import ImageFinder, SplitNames, canonical_split, is_plain, split_in
from .files import DataFolder, only_usable
from .raw import SPLITS, AnnotationBuilder, Annotations, Problem, RawDataset, RawSplit, in_order, merge_categories


class KeyNumbers:
    """Turns ids into integers. Integers and their texts keep their value; other texts are numbered in order.

    Args:
        entries: entries of the file, of any type.
        field: name of the field with the id.
    """

    def __init__(self, entries: list, field: str):
        keys = [_as_key(entry.get(field)) for entry in entries if isinstance(entry, dict)]
        texts = list(dict.fromkeys(key for key in keys if isinstance(key, str)))
        first = max((key for key in keys if isinstance(key, int) and key < 2**62), default=0) + 1
        self._number_of = {text: first + index for index, text in enumerate(texts)}

    def number(self, value) -> int | None:
        """The integer of an id. None: the value cannot be an id. A text that no entry has gets a negative number."""
        if type(value) is int and -(2**63) <= value < 2**63:  # the usual case, fast because it runs for each box
            return value
        key = _as_key(value)
        if isinstance(key, str):
            return self._number_of.get(key) or self._unknown(key)
        return key

    def _unknown(self, key: str) -> int:
        return self._number_of.setdefault(key, -(2**62) - len(self._number_of))

    def notes(self, what: str) -> list[str]:
        """A note, if texts were numbered."""
        known = {key: number for key, number in self._number_of.items() if number >= 0}
        if not known:
            return []
        first = next(iter(known))
        return [
            f"{what} are texts such as {first[:40]!r}. {len(known)} are replaced by numbers, which start at {known[first]}."
        ]


def _as_key(value) -> int | str | None:
    if isinstance(value, dict) and set(value) == {"$oid"}:  # an id of MongoDB
        value = value["$oid"]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch(r"(0|-?[1-9][0-9]{0,18})", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return value if isinstance(value, str) or -(2**63) <= value < 2**63 else None


_LISTS = ("images", "annotations", "categories")
_NO_BOXES = ("captions", "panoptic", "stuff", "person_keypoints")  # other files of COCO beside its instances_*.json
_TOO_LARGE = 10**300  # limit of integers; a float holds less than 1.8e308
_MOST_JSONS = 100  # a folder with more has one json for each image, in another format


def read_json(path: Path):
    """Content of a json, without the masks of objects, which need most of the memory.

    Raises:
        FileNotFoundError, OSError, ValueError: the file does not exist, is not a regular file, or is broken.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no annotation file {path}.")
    return regular_files.read_json(path, object_hook=_without_mask)


def _without_mask(entry: dict) -> dict:
    entry.pop("segmentation", None)
    return entry


def is_detection(content) -> bool:
    """Whether a json is for detection: it has images, and boxes or categories, and is not for panoptic segmentation."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    annotations = content.get("annotations")
    if not annotations or not isinstance(annotations, list):
        return "categories" in content or "annotations" in content
    fields = set().union(*(entry for entry in annotations[:100] if isinstance(entry, dict)))
    return bool({"bbox", "category_id"} & fields) or ("categories" in content and "segments_info" not in fields)


def read_coco(source: Path, allow_outside: bool = False) -> RawDataset | None:
    """Read a json, or a folder with jsons at any depth. None: no json is in COCO format.

    The split of a json is in its name, or in the name of a folder between it and `source`. A single json without a split in these
    names is "train".

    Raises:
        ValueError: the given json cannot be read.
    """
    notes, problems, contents = [], [], {}
    files = DataFolder(_image_root(source), allow_outside=allow_outside)
    if not source.is_dir():
        contents[source] = read_json(source)
    else:
        for path in _candidates(source, files):
            try:
                content = read_json(path)
            except (ValueError, OSError) as error:
                problems.append(Problem("unreadable-file", str(path), str(error)))
                continue
            if is_detection(content):
                contents[path] = content
            elif isinstance(content, dict) and "images" in content:
                notes.append(f"{path} has images, but no boxes, and is skipped.")
    if not contents:
        return None
    listed = [name for content in contents.values() for name in _file_names(content)]
    splits, categories, finder = {}, [], ImageFinder(files, _image_root(source), listed)
    names = SplitNames(source, contents if source.is_dir() else (), files_name_splits=True)
    for name, path in _name_splits(source, list(contents), names, problems).items():
        split, own_categories, own_problems, own_notes = read_split(
            contents.pop(path), path, name, finder.for_split(path, name)
        )
        for image in split.images:
            if image["path"] in finder.candidates:
                image["candidates"] = finder.candidates[image["path"]]
        notes += own_notes
        splits[name], split_notes = merge_categories(categories, split, own_categories)
        notes += split_notes
        problems += own_problems
    notes += names.notes() + files.notes()
    return only_usable(RawDataset("coco", source, splits, categories, problems, notes), files)


def _file_names(content) -> Iterator[str]:
    images = content.get("images") if isinstance(content, dict) else None
    for entry in images if isinstance(images, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
            yield entry["file_name"]


def _candidates(folder: Path, files: DataFolder) -> list[Path]:
    """Jsons that may be in COCO format. COCO's own files without boxes of all classes are left out."""
    found = []
    for _, paths in groupby(files.files(folder, {".json"}), key=lambda path: path.parent):
        jsons = list(paths)
        if any(path.name.startswith("instances") for path in jsons):
            jsons = [path for path in jsons if not path.name.startswith(_NO_BOXES)]
        if len(jsons) <= _MOST_JSONS:
            found += jsons
    return found


def _image_root(source: Path) -> Path:
    """The folder that is searched for images."""
    if source.is_dir():
        return source
    folder = source.absolute().parent
    for part in (folder, folder.parent):
        if re.match(r"(annotation|label)s?(?![a-z])", part.name.lower()) and is_plain(part.name):
            return part.parent
    return folder


def _split_word(source: Path, path: Path, names: SplitNames) -> str | None:
    """The split in the name of a json, else in the name of its nearest folder with a split."""
    if split := names.split_of_file(path) if source.is_dir() else split_in(path.stem, at_end=True):
        return split
    # The folder above may have any name, so only the exact name of a split counts.
    name = canonical_split((source if source.is_dir() else source.parent).absolute().name)
    return name if name in SPLITS else None


def _name_splits(source: Path, paths: list[Path], names: SplitNames, problems: list[Problem]) -> dict[str, Path]:
    """Map each split to its json. If two jsons name the same split, the second keeps its own name. Except for test, this is a
    problem."""
    words = {path: _split_word(source, path, names) for path in paths}
    if len(paths) == 1:
        return {words[paths[0]] or "train": paths[0]}
    splits = {}
    # instances_*.json first, then shorter names: test2017 before test-dev2017
    for path in sorted(paths, key=lambda path: (not path.name.startswith("instances"), len(path.name), path)):
        name = words[path] or path.stem
        if name in splits:
            if name != "test":
                message = (
                    f"The names of {path} and {splits[name]} both say {name!r}; give the path of one of the two files, or merge "
                    "them into one json."
                )
                problems.append(Problem("two-files-for-a-split", str(path), message))
            name = path.relative_to(source).with_suffix("").as_posix()
        splits[name] = path
    return in_order(splits)


def read_split(
    content, path: Path, name: str, find_image: Callable[[str], Path]
) -> tuple[RawSplit, list[dict], list[Problem], list[str]]:
    """Read one json.

    Ids may be texts, as in exports of databases. The text of a number becomes that number; other texts are numbered.

    Args:
        find_image: function from file_name to an absolute path, which need not exist.
    Returns:
        the split, its categories, problems of entries, and notes for the user.
    """
    problems = []
    if not isinstance(content, dict):
        content = {}
    optional = ("annotations", "categories") if name == "test" else ()
    missing = [part for part in _LISTS if not isinstance(content.get(part), list)]
    if [part for part in missing if part not in optional or part in content]:
        problems.append(
            Problem("missing-list", str(path), f"{path} is not in COCO format: it has no list of {missing}.")
        )

    images, annotations, categories = ([] if part in missing else content[part] for part in _LISTS)
    image_ids, category_ids = KeyNumbers(images, "id"), KeyNumbers(categories, "id")
    fields = {"id": category_ids, "name": str}
    categories = [entry for _, entry in _typed_entries(categories, path, "category {}", fields, problems)]
    for entry in categories:
        if not isinstance(entry.get("supercategory"), str):
            entry.pop("supercategory", None)
    fields, columns = {"id": image_ids, "file_name": str}, ("id", "file_name", "width", "height")
    entries = [{name: entry.get(name) for name in columns}
               for _, entry in _typed_entries(images, path, "image {}", fields, problems)]  # fmt: skip
    for entry in entries:
        entry["path"] = find_image(entry["file_name"])
    annotations = _read_annotations(annotations, path, image_ids, category_ids, problems)
    notes = [*image_ids.notes(f"{path}: ids of images"), *category_ids.notes(f"{path}: ids of categories")]
    return RawSplit(name, path, entries, annotations), categories, problems, notes


def _typed_entries(
    entries: list, path: Path, where: str, fields: dict[str, Any], problems: list[Problem]
) -> Iterator[tuple[int, dict]]:
    """Number and content of the entries whose fields have the right types, with ids as integers. Others are problems."""
    for number, entry in enumerate(entries):
        if message := _wrong_type(entry, fields):
            place = f"{path}: {where.format(number)}"
            problems.append(Problem("bad-entry", place, f"{place} {message}."))
            continue
        for field, kind in fields.items():
            if isinstance(kind, KeyNumbers) and type(entry[field]) is not int:
                entry[field] = kind.number(entry[field])
        yield number, entry


def _read_annotations(
    entries: list, path: Path, image_ids: KeyNumbers, category_ids: KeyNumbers, problems: list[Problem]
) -> Annotations:
    annotations = AnnotationBuilder()
    fields = {"image_id": image_ids, "category_id": category_ids, "bbox": list}
    for number, entry in _typed_entries(entries, path, "annotations[{}]", fields, problems):
        box, area, crowd, own_id = entry["bbox"], entry.get("area"), entry.get("iscrowd"), entry.get("id")
        message = None
        if len(box) != 4 or not all(map(_is_number, box)):
            message = f"bbox={short_repr(box)}; it must be (x, y, width, height) in pixels."
        elif not (area is None or _is_number(area)) or crowd not in (0, 1, None):
            message = f"area={short_repr(area)} and iscrowd={short_repr(crowd)}; they must be a number, and 0 or 1."
        if message:
            place = f"{path}: annotations[{number}]"
            problems.append(Problem("bad-entry", place, f"{place} has {message}"))
            continue
        own_id = own_id if isinstance(own_id, int | str) else None  # others come from databases
        annotations.add(entry["image_id"], entry["category_id"], box, number, 0, area, crowd, own_id)
    return annotations.build()


def _is_number(value) -> bool:
    """Whether a value fits into a float. NaN and infinity do; the checks find them later. True and False do not."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < _TOO_LARGE
    )


_KINDS = {str: "a text that is not empty", list: "a list"}


def _wrong_type(entry, fields: dict) -> str | None:
    """Text about an entry that is not an object, or about its first field of a wrong type. None: the types are right."""
    if not isinstance(entry, dict):
        return f"is {short_repr(entry)}; it must be an object with {' and '.join(fields)}"
    for name, kind in fields.items():
        value = entry.get(name)
        if isinstance(kind, KeyNumbers):
            if kind.number(value) is not None:
                continue
            if isinstance(value, int) and value.bit_length() > 63:
                return f"has {name}={short_repr(value)}, which is more than 64 bits hold; give it a smaller number"
            return f"has {name}={short_repr(value)}; it must be a whole number or a text"
        if not isinstance(value, kind) or value == "":
            return f"has {name}={short_repr(value)}; it must be {_KINDS[kind]}"
    return None
