"""YOLO: a yaml with classes and folders, and a txt beside or opposite each image, read as Ultralytics reads them."""

import os
from pathlib import Path

import yaml

from ..common.images import IMAGE_SUFFIXES
from .files import read_lines, read_text
from .image_finder import image_files
from .raw import Problem, RawDataset, in_order, split_in
from .yolo_labels import label_file, labels_without_image, read_labels

_SPLIT_KEYS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_NAMES = ("data", "dataset")
_NAMES_FILES = ("classes.txt", "obj.names", "labels/classes.txt")  # the last: of labelImg


def find_yaml(source: Path) -> Path | None:
    """The yaml given, or the one in a folder that describes a YOLO data set.

    Raises:
        ValueError: several do, and none is called data.yaml or dataset.yaml; or the one given is none.
    """
    if source.is_file():
        if not _is_yolo(source):
            raise ValueError(
                f"{source} is not the yaml of a YOLO data set: it needs `names`, and `train` or `val` folders."
            )
        return source
    found = []
    for patterns in (("*.yaml", "*.yml"), ("*/*.yaml", "*/*.yml")):  # archives often hold a single folder
        paths = sorted(path for pattern in patterns for path in source.glob(pattern))
        found = found or [path for path in paths if _is_yolo(path, must_be_yaml=path.stem in _NAMES)]
    named = [path for path in found if path.stem in _NAMES]
    if len(found) > 1 and len(named) != 1:
        names = [path.relative_to(source).as_posix() for path in found]
        raise ValueError(f"{source} has several yaml files of YOLO data sets: {names}; give one of them.")
    return (named or found or [None])[0]


def _is_yolo(path: Path, must_be_yaml: bool = True) -> bool:
    try:
        content = _read_yaml(path)
    except ValueError:
        if must_be_yaml:
            raise
        return False
    return (
        isinstance(content, dict)
        and {"names", "nc"} & set(content)
        and {"train", "val", "test"} & set(content) != set()
    )


def _read_yaml(path: Path):
    """Its content with all values as strings, as a class may be called `no` or `007`. Keys without a value are left out.

    Raises:
        ValueError: it is broken.
    """
    try:
        content = yaml.load(read_text(path), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid yaml: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if value not in ("", "~", "null", [])}


def read_yolo(yaml_file: Path) -> RawDataset:
    """The data set of a yaml: `path`, `train`, `val` and `test` (folders, lists of them, or txt files that list images), `names`.

    A txt has lines of class, centre x, centre y, width, height, relative to the image as it is seen (turned by its EXIF
    orientation); of a polygon (class x1 y1 x2 y2 x3 y3 ...) the bounding box is taken. An image without a txt has no boxes.
    Images are numbered from 1 in each split, in the order of their paths; class numbers are the category ids.
    """
    content = _read_yaml(yaml_file)
    problems, splits, notes = [], {}, []
    categories = _categories(content, yaml_file, problems)
    for key, name in _SPLIT_KEYS.items():
        if content.get(key) is None or name in splits:
            continue
        paths, missing = _images_of(content[key], content.get("path"), yaml_file)
        missing = [f"{place}, which {yaml_file} names as {key}, {why}" for place, why in missing]
        if missing and not paths and name == "test":
            notes.append(f"{missing[0]}, so there are no test data.")
            continue
        problems += [Problem("missing-folder", f"{yaml_file}: {key}", f"{one}.") for one in missing]
        if paths:
            splits[name] = read_labels(name, yaml_file, paths, "kpt_shape" in content, problems)
    return RawDataset("yolo", yaml_file, splits, categories, problems, notes + labels_without_image(splits))


def read_yolo_without_yaml(folder: Path) -> RawDataset | None:
    """As labelling tools export: `classes.txt` or `obj.names` with a class per line, and images with their txt files anywhere
    below, in folders called as splits or not. None if there is none of them, or no txt of an image."""
    names_file = next((folder / name for name in _NAMES_FILES if (folder / name).is_file()), None)
    paths = [] if names_file is None else [path.absolute() for path in image_files(folder)]
    if not any(label_file(path).is_file() for path in paths):
        return None
    names = map(str.strip, read_text(names_file).splitlines())
    categories = [{"id": number, "name": name} for number, name in enumerate(names) if name]
    of_split: dict[str, list[Path]] = {}
    for path in sorted(paths):
        told = filter(None, map(split_in, path.relative_to(folder.absolute()).parts[-2::-1]))
        of_split.setdefault(next(told, "train"), []).append(path)
    problems = []
    splits = {name: read_labels(name, names_file, paths, False, problems) for name, paths in in_order(of_split).items()}
    return RawDataset("yolo", folder, splits, categories, problems, labels_without_image(splits))


def _categories(content: dict, yaml_file: Path, problems: list[Problem]) -> list[dict]:
    names, count = content.get("names"), content.get("nc")
    if count is not None and not (isinstance(count, str) and count.isdecimal()):
        message = f"{yaml_file} has nc={count!r}; it must be the number of classes."
        problems.append(Problem("bad-entry", f"{yaml_file}: nc", message))
        count = None
    if names is None:
        names = [f"class_{index}" for index in range(int(count or 0))]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(key.isdecimal() for key in map(str, names)):
        message = f"{yaml_file} has names={names!r}; they must be a list, or a dictionary with class numbers."
        problems.append(Problem("bad-entry", f"{yaml_file}: names", message))
        return []
    if count is not None and int(count) != len(names):
        message = f"{yaml_file} has nc={count}, but {len(names)} names: {list(names.values())}; correct one of them."
        problems.append(Problem("bad-entry", f"{yaml_file}: nc", message))
    return [{"id": int(number), "name": str(name)} for number, name in names.items()]


def _images_of(entries, path, yaml_file: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Images of one split in the order of their paths, and what is wrong with entries that lead to none."""
    beside = yaml_file.absolute().parent
    bases = (
        [beside] if path is None else [beside / _posix(str(path)), Path.cwd() / _posix(str(path)), beside]
    )  # an absolute path replaces
    images, missing = [], []
    for entry in map(_posix, map(str, entries if isinstance(entries, list) else [entries])):
        # "../train/images" is meant from the folder of the yaml in exports of Roboflow, which is where it is not
        places = [base / entry for base in bases] + [base / entry.removeprefix("../") for base in bases]
        place = next((Path(os.path.normpath(place)) for place in places if place.exists()), None)
        if place is None:
            missing.append((places[0], "does not exist"))
            continue
        found = []
        if place.is_dir():
            found = list(image_files(place))
        elif place.suffix == ".txt":
            found = [_listed(_posix(line), [place.parent, *bases]) for line in read_lines(place)]
        elif place.suffix.lower() in IMAGE_SUFFIXES:
            found = [place]
        images += found
        if not found:
            missing.append((place, "has no images"))
    return sorted(dict.fromkeys(images)), missing


def _posix(path: str) -> str:
    return path.replace("\\", "/")  # of data sets made on Windows


def _listed(line: str, bases: list[Path]) -> Path:
    places = [Path(os.path.normpath(base / line)) for base in bases]
    return next((place for place in places if place.is_file()), places[0])
