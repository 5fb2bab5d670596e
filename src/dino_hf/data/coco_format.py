"""COCO json files, wherever their images are."""

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from .categories import merge_categories
from .files import files_below
from .image_finder import ImageFinder
from .raw import SPLITS, Problem, RawDataset, RawSplit, canonical_split, in_order, split_in

_LISTS = ("images", "annotations", "categories")
_NO_BOXES = ("captions", "panoptic", "stuff", "person_keypoints")  # of COCO itself, beside its instances_*.json
_MOST_JSONS = 100  # more are one for each image, in another format


def read_json(path: Path):
    """Content of a json, without the masks of objects, which are most of it.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is broken.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotation file {path}.")
    try:
        return json.loads(path.read_bytes(), object_hook=_without_mask)
    except ValueError as error:
        raise ValueError(f"{path} is not valid json: {error}.") from error


def _without_mask(entry: dict) -> dict:
    entry.pop("segmentation", None)
    return entry


def is_detection(content) -> bool:
    """Whether a json is meant for detection: it has images, and boxes or categories, and is not for panoptic segmentation."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    annotations = content.get("annotations")
    if not annotations or not isinstance(annotations, list):
        return "categories" in content or "annotations" in content
    fields = set().union(*(entry for entry in annotations[:100] if isinstance(entry, dict)))
    return bool({"bbox", "category_id"} & fields) or ("categories" in content and "segments_info" not in fields)


def read_coco(source: Path) -> RawDataset | None:
    """A json, or a folder with jsons at any depth; None if it holds none in COCO format.

    The split of a json is told by its name, or by the folders between it and `source`; a single one that tells none is "train".

    Raises:
        ValueError: the json given cannot be read.
    """
    notes, problems, contents = [], [], {}
    if source.is_file():
        contents[source] = read_json(source)
    else:
        for path in _candidates(source):
            try:
                content = read_json(path)
            except ValueError as error:
                problems.append(Problem("unreadable-file", str(path), str(error)))
                continue
            if is_detection(content):
                contents[path] = content
            elif isinstance(content, dict) and "images" in content:
                notes.append(f"{path} has images, but no boxes, and is passed over.")
    if not contents:
        return None
    splits, categories, finder = {}, [], ImageFinder(_image_root(source))
    for name, path in _name_splits(source, list(contents), problems).items():
        split, own_categories, own_problems = read_split(contents.pop(path), path, name, finder.of_split(path, name))
        splits[name], split_notes = merge_categories(categories, split, own_categories)
        notes += split_notes
        problems += own_problems
    return RawDataset("coco", source, splits, categories, problems, notes)


def _candidates(folder: Path) -> list[Path]:
    """Jsons that may be in COCO format. Of COCO's own files for one set of images those with boxes of all classes."""
    found = []
    for _, paths in groupby(files_below(folder, {".json"}), key=lambda path: path.parent):
        jsons = list(paths)
        if any(path.name.startswith("instances") for path in jsons):
            jsons = [path for path in jsons if not path.name.startswith(_NO_BOXES)]
        if len(jsons) <= _MOST_JSONS:
            found += jsons
    return found


def _image_root(source: Path) -> Path:
    """The folder below which images are looked for."""
    if source.is_dir():
        return source
    folder = source.absolute().parent
    for part in (folder, folder.parent):
        if part.name.lower().startswith(("annotation", "label")):
            return part.parent
    return folder


def _split_word(source: Path, path: Path) -> str | None:
    """The split that a json's name tells, or else the nearest of its folders that tells one."""
    if split := split_in(path.stem):
        return split
    if source.is_dir():
        for folder in path.relative_to(source).parts[-2::-1]:
            if split := split_in(folder):
                return split
    # of folders above, which may be called anything, only one that is called as a split is
    name = canonical_split((source if source.is_dir() else source.parent).absolute().name)
    return name if name in SPLITS else None


def _name_splits(source: Path, paths: list[Path], problems: list[Problem]) -> dict[str, Path]:
    """Split -> its json. Where two jsons want one name the second has its own, and for data to learn from that is a problem."""
    words = {path: _split_word(source, path) for path in paths}
    if len(paths) == 1:
        return {words[paths[0]] or "train": paths[0]}
    splits = {}
    # instances_*.json first; of two, the shorter name: test2017 before test-dev2017
    for path in sorted(paths, key=lambda path: (not path.name.startswith("instances"), len(path.name), path)):
        name = words[path] or path.stem
        if name in splits:
            if name != "test":
                message = (
                    f"{path} and {splits[name]} both are {name} data by their names; give the path of one of them, "
                    "or make one json of both."
                )
                problems.append(Problem("two-files-for-a-split", str(path), message))
            name = path.relative_to(source).with_suffix("").as_posix()
        splits[name] = path
    return in_order(splits)


def read_split(
    content, path: Path, name: str, find_image: Callable[[str], Path]
) -> tuple[RawSplit, list[dict], list[Problem]]:
    """One json's images and annotations, its categories, and the entries that are none.

    Args:
        find_image: file_name -> absolute path, which need not exist.
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

    def typed(part: str, kind: str, fields: dict[str, type]) -> Iterator[tuple[int, dict]]:
        for number, entry in enumerate(content.get(part) if part not in missing else ()):
            where = f"{part}[{number}]" if part == "annotations" else f"{kind} {number}"
            if message := _wrong_type(entry, fields):
                problems.append(Problem("bad-entry", f"{path}: {where}", f"{path}: {where} {message}."))
            else:
                yield number, entry

    categories = [entry for _, entry in typed("categories", "category", {"id": int, "name": str})]
    images = []
    for _, entry in typed("images", "image", {"id": int, "file_name": str}):
        entry.setdefault("width", None)
        entry.setdefault("height", None)
        entry["path"] = find_image(entry["file_name"])
        images.append(entry)
    annotations = []
    for number, entry in typed("annotations", "annotation", {"image_id": int, "category_id": int, "bbox": list}):
        where, box = f"annotations[{number}]", entry["bbox"]
        if len(box) != 4 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in box):
            message = f"{path}: {where} has bbox={box}; it must be (x, y, width, height) in pixels."
            problems.append(Problem("bad-entry", f"{path}: {where}", message))
        elif not isinstance(entry.get("area"), int | float | None) or entry.get("iscrowd") not in (0, 1, None):
            message = (
                f"{path}: {where} has area={entry.get('area')!r} and iscrowd={entry.get('iscrowd')!r}; they must be "
            )
            problems.append(Problem("bad-entry", f"{path}: {where}", message + "a number, and 0 or 1."))
        else:
            entry["where"] = where
            annotations.append(entry)
    return RawSplit(name, path, images, annotations), categories, problems


def _wrong_type(entry, fields: dict[str, type]) -> str | None:
    for name, kind in fields.items():
        value = entry.get(name) if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or not isinstance(value, kind) or isinstance(value, bool) or value == "":
            return f"has {name}={value!r}, but needs {name} as {kind.__name__}"
        if kind is int and not -(2**63) <= value < 2**63:
            return f"has {name}={value}, which is more than 64 bits hold"
    return None
