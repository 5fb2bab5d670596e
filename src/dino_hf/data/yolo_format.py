"""YOLO: a yaml with classes and folders, and a txt beside or opposite each image, read as Ultralytics reads them."""

import os
from pathlib import Path

from ..common.images import IMAGE_SUFFIXES
from ..common.regular_files import is_folder, is_regular
from ..common.values import short_repr
from .files import DataFolder
from .image_finder import image_files, posix
from .raw import Problem, RawDataset, in_order
from .split_lists import darknet_lists, lists_beside
from .split_names import SplitNames
from .usable import only_usable
from .yolo_labels import label_file, labels_without_image, read_labels, without_masks

_SPLIT_KEYS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_NAMES = ("data", "dataset")
_NAMES_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "data/obj.names")  # the third: of labelImg
_MOST_CLASSES = 100_000


def find_yaml(source: Path, files: DataFolder | None = None) -> Path | None:
    """The yaml given, or the one in a folder that describes a YOLO data set.

    Args:
        files: of the folder; None for a yaml, which the user named.
    Raises:
        ValueError: several do, and none is called data.yaml or dataset.yaml; or the one given is none.
    """
    files = files or DataFolder(source, allow_outside=True)
    if not source.is_dir():
        if not _is_yolo(source, files):
            raise ValueError(
                f"{source} is not the yaml of a YOLO data set: it needs `names`, and `train` or `val` folders."
            )
        return source
    found = []
    for patterns in (("*.yaml", "*.yml"), ("*/*.yaml", "*/*.yml")):  # archives often hold a single folder
        paths = sorted(path for pattern in patterns for path in source.glob(pattern) if files.is_file(path))
        found = found or [path for path in paths if _is_yolo(path, files, must_be_yaml=path.stem in _NAMES)]
    named = [path for path in found if path.stem in _NAMES]
    if len(found) > 1 and len(named) != 1:
        names = [path.relative_to(source).as_posix() for path in found]
        raise ValueError(f"{source} has several yaml files of YOLO data sets: {short_repr(names)}; give one of them.")
    return (named or found or [None])[0]


def _is_yolo(path: Path, files: DataFolder, must_be_yaml: bool = True) -> bool:
    try:
        content = _read_yaml(path, files)
    except (ValueError, OSError):
        if must_be_yaml:
            raise
        return False
    return (
        isinstance(content, dict)
        and {"names", "nc"} & set(content)
        and {"train", "val", "test"} & set(content) != set()
    )


def _read_yaml(path: Path, files: DataFolder):
    """As `read_yaml`. Keys without a value are left out."""
    content = files.read_yaml(path)
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if value not in ("", "~", "null", [])}


def read_yolo(yaml_file: Path, source: Path | None = None, allow_outside: bool = False) -> RawDataset:
    """The data set of a yaml: `path`, `train`, `val` and `test` (folders, lists of them, or txt files that list images), `names`.

    A txt has lines of class, centre x, centre y, width, height, relative to the image as it is seen (turned by its EXIF
    orientation); of a polygon (class x1 y1 x2 y2 x3 y3 ...) the bounding box is taken. An image without a txt has no boxes.
    Images are numbered from 1 in each split, in the order of their paths; class numbers are the category ids.

    Args:
        source: what the user named: the yaml, whose `path` is then read wherever it leads, or a folder that all must lie in.
    """
    beside, source = yaml_file.absolute().parent, source or yaml_file
    content = _read_yaml(yaml_file, DataFolder(beside, allow_outside=True))
    problems, splits, notes = [], {}, []
    path = content.get("path")
    if path is not None and not isinstance(path, str):
        problems.append(
            Problem("bad-entry", f"{yaml_file}: path", f"{yaml_file} has path={short_repr(path)}; it must be a folder.")
        )
        path = None
    bases = (
        [beside] if path is None else [beside / posix(path), Path.cwd() / posix(path), beside]
    )  # an absolute path replaces
    folders = [source.absolute() if source.is_dir() else beside]
    if not source.is_dir() and path is not None:
        folders += [base for base in bases if is_folder(base)]
        if not DataFolder(beside).is_inside(folders[1] if len(folders) > 1 else beside):
            notes.append(f"The images are in {os.path.realpath(folders[1])}, which {yaml_file} names as its path.")
    files = DataFolder(*folders, allow_outside=allow_outside)
    categories = _categories(content, yaml_file, problems)
    for key, name in _SPLIT_KEYS.items():
        if content.get(key) is None or name in splits:
            continue
        paths, missing = _images_of(content[key], bases, files)
        missing = [(kind, f"{place}, which {yaml_file} names as {key}, {why}") for kind, place, why in missing]
        if missing and not paths and name == "test" and missing[0][0] != "outside":
            notes.append(f"{missing[0][1]}, so there are no test data.")
            continue
        problems += [Problem(kind, f"{yaml_file}: {key}", f"{one}.") for kind, one in missing]
        if paths:
            paths, masks = without_masks(paths)
            notes += masks
            splits[name] = read_labels(name, yaml_file, paths, "kpt_shape" in content, files, problems)
    notes += labels_without_image(splits, files) + files.notes()
    return only_usable(RawDataset("yolo", yaml_file, splits, categories, problems, notes), files)


def read_yolo_without_yaml(folder: Path, files: DataFolder) -> RawDataset | None:
    """As labelling tools export: `classes.txt` or `obj.names` with a class per line, and images with their txt files anywhere
    below. None if there is none of them, or no txt of an image.

    Splits are those of the lists that obj.data names, of train.txt and others, or else of folders.
    """
    names_file = _names_file(folder, files)
    root = folder.absolute()
    paths = [] if names_file is None else sorted(image_files(root, files))
    if not any(is_regular(label_file(path)) for path in paths):
        return None
    names = map(str.strip, files.read_text(names_file).splitlines())
    categories = [{"id": number, "name": name} for number, name in enumerate(names) if name]
    paths, notes = without_masks(paths)
    lists = darknet_lists(root, files) or lists_beside(root, files)
    splits_of, missing = lists.shares(files, root, paths) if lists else ({}, [])
    if lists and not splits_of:
        notes.append(f"{folder}: no line of {lists.where} names an image, so these lists are passed over.")
        lists, missing = None, []
    split_names, of_split = SplitNames(root, paths), {}
    for path in paths:
        for split in splits_of.get(path, []) if lists else [split_names.of_file(path) or "train"]:
            of_split.setdefault(split, []).append(path)
    problems = [
        Problem(
            "missing-file",
            f"{folder}: {short_repr(line)}",
            f"{short_repr(line)}, listed as {split} data in {lists.where}, {why}.",
        )
        for split, line, why in missing
    ]
    unlisted = [path for path in paths if lists and path not in splits_of]
    if unlisted:
        notes.append(
            f"{folder}: {len(unlisted)} images are in no list of {lists.where} and are passed over; the first is {unlisted[0]}."
        )
    splits = {
        name: read_labels(name, names_file, paths, False, files, problems) for name, paths in in_order(of_split).items()
    }
    notes += split_names.notes() + labels_without_image(splits, files) + files.notes()
    return only_usable(RawDataset("yolo", folder, splits, categories, problems, notes), files)


def _names_file(folder: Path, files: DataFolder) -> Path | None:
    return next((folder / name for name in _NAMES_FILES if files.is_file(folder / name)), None)


def why_no_yolo(folder: Path, files: DataFolder) -> str | None:
    """Why a folder with names of classes is no data set; None if it has none."""
    names_file = _names_file(folder, files)
    if names_file is None:
        return None
    labels = [path for path in files.files(folder, {".txt"}) if path != names_file]
    images = next(image_files(folder, files), None)
    if images is None:
        where = f"{len(labels)} txt files" if labels else "no txt files either"
        return f"there are names of classes in {names_file} and {where}, but no images; copy the images into {folder / 'images'}."
    return f"there are names of classes in {names_file} and images such as {images}, but no txt beside one or in a folder labels."


def _categories(content: dict, yaml_file: Path, problems: list[Problem]) -> list[dict]:
    def refuse(field: str, text: str) -> None:
        problems.append(Problem("bad-entry", f"{yaml_file}: {field}", f"{yaml_file} has {text}."))

    names, count = content.get("names"), content.get("nc")
    if count is not None:
        if isinstance(count, str) and count.isdecimal() and len(count) < 19 and int(count) <= _MOST_CLASSES:
            count = int(count)
        else:
            refuse("nc", f"nc={short_repr(count)}; it must be the number of classes, at most {_MOST_CLASSES:,}")
            count = None
    if names is None:
        names = [f"class_{index}" for index in range(count or 0)]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(key.isdecimal() and len(key) < 19 for key in map(str, names)):
        refuse("names", f"names={short_repr(names)}; they must be a list, or a dictionary with class numbers")
        return []
    if wrong := [name for name in names.values() if not isinstance(name, str)]:
        refuse("names", f"a class named {short_repr(wrong[0])}; a name must be a text")
        return []
    if count is not None and count != len(names):
        refuse("nc", f"nc={count}, but {len(names)} names: {short_repr(list(names.values()))}; correct one of them")
    return [{"id": int(number), "name": name} for number, name in names.items()]


def _images_of(entries, bases: list[Path], files: DataFolder) -> tuple[list[Path], list[tuple[str, Path | str, str]]]:
    """Images of one split in the order of their paths, and what is wrong with entries that lead to none: kind, place, why."""
    images, missing = [], []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            missing.append(("bad-entry", short_repr(entry), "must be a folder, a list of them, or a txt file"))
            continue
        places = _places(posix(entry), bases)
        inside = [place for place in places if files.is_inside(place)]
        place = next((place for place in inside if place.is_dir() or is_regular(place)), None)
        if place is None:
            there = [place for place in places if place not in inside and (place.is_dir() or is_regular(place))]
            why = f"leads out of the data set: {files.outside_text(there[0])[:-1]}" if there else "does not exist"
            missing.append(("outside" if there else "missing-folder", there[0] if there else places[0], why))
            continue
        found = []
        if place.is_dir():
            found = list(image_files(place, files))
        elif place.suffix == ".txt":
            found = [_listed(posix(line), [place.parent, *bases], files) for line in files.read_lines(place)]
        elif place.suffix.lower() in IMAGE_SUFFIXES:
            found = [place]
        images += found
        if not found:
            missing.append(("missing-folder", place, "has no images"))
    return sorted(dict.fromkeys(images)), missing


def _places(entry: str, bases: list[Path]) -> list[Path]:
    """Where an entry may lead.

    Exports of Roboflow have "../train/images" for images that lie beside the yaml: there first, as the folder above may hold
    another export.
    """
    stripped = entry.removeprefix("../")
    entries = [stripped, entry] if stripped != entry else [entry]
    return [Path(os.path.normpath(base / one)) for one in entries for base in bases]


def _listed(line: str, bases: list[Path], files: DataFolder) -> Path:
    places = [Path(os.path.normpath(base / line)) for base in bases]
    return next((place for place in places if files.is_file(place)), next(filter(is_regular, places), places[0]))
